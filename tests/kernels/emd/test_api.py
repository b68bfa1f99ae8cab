"""The public functions: what they take and refuse, determinism, interruption, memory, sampling."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from emd_clouds import exact, hard_pairs, mean_distance

from vitapack import _C
from vitapack.kernels.emd import solve as module
from vitapack.kernels.emd.solve import debiased_emd, emd, emd_floor, sample_surface

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(2, 50, 3))
FIELDS = ("distance", "assignment", "lower_bound", "gap", "converged", "bids", "phases", "prices")


def same(a: module.EMDResult, b: module.EMDResult) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


def test_shapes_and_types() -> None:
    batch = emd(np.stack([X, Y]), np.stack([Y, X]), return_prices=True)
    assert batch.distance.shape == batch.gap.shape == batch.converged.shape == (2,)
    assert batch.assignment.shape == batch.prices.shape == (2, 50)
    assert batch.assignment.dtype == np.int64
    assert batch.distance.dtype == batch.lower_bound.dtype == np.float64
    single = emd(X, Y)
    assert single.distance.shape == ()
    assert single.assignment.shape == (50,)
    assert single.prices is None
    assert emd(np.zeros((0, 5, 3)), np.zeros((0, 5, 3))).assignment.shape == (0, 5)


def test_torch_numpy_strides_and_mixed_precision_agree() -> None:
    found = emd(X, Y, return_prices=True)
    wide = np.repeat(X, 2, axis=0)[::2]
    assert not wide.flags.c_contiguous
    assert same(found, emd(wide, np.asfortranarray(Y), return_prices=True))
    tensor = torch.from_numpy(X).requires_grad_()
    on_torch = emd(tensor, torch.from_numpy(Y), return_prices=True)
    assert on_torch.assignment.dtype == torch.int64
    assert on_torch.gap.dtype == torch.float64
    assert not on_torch.distance.requires_grad
    assert all(np.array_equal(getattr(on_torch, f).numpy(), getattr(found, f)) for f in FIELDS)
    mixed = emd(X.astype(np.float32), Y)
    assert mixed.distance == emd(X.astype(np.float32).astype(np.float64), Y).distance


def test_same_bits_for_any_threads_batch_and_instruction_set() -> None:
    pairs = hard_pairs(150)
    names = sorted(pairs)
    x, y = (np.stack([pairs[name][side] for name in names]) for side in (0, 1))
    batch = emd(x, y, threads=1, return_prices=True)
    for threads in (2, 5):
        assert same(batch, emd(x, y, threads=threads, return_prices=True))
    for b, name in enumerate(names):
        single = emd(*pairs[name], return_prices=True)
        assert all(np.array_equal(getattr(single, f), getattr(batch, f)[b]) for f in FIELDS)
    sets = _C.emd_instruction_sets()
    assert sets[-1] == "portable"
    for name in sets:
        for p, prices in ((1, batch.prices), (2, None)):
            options = dict(p=p, gap=1e-3, max_bids=2**62, threads=2, prices=True)
            found = _C.emd_auction(x, y, **options, isa=name)
            other = _C.emd_auction(x, y, **options, isa="portable")
            assert all(np.array_equal(found[f], other[f]) for f in found)
            if prices is not None:
                assert np.array_equal(found["prices"], prices)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "words"),
    [
        (X[:, :2], Y[:, :2], {}, ValueError, r"x: expected shape .* got \(50, 2\)"),
        (X, Y[:49], {}, ValueError, r"\(50, 3\), y \(49, 3\)"),
        (X[None, None], Y[None, None], {}, ValueError, "x: expected shape"),
        (X[:0], Y[:0], {}, ValueError, "no points"),
        (np.where(X[3, 1] == X, np.nan, X), Y, {}, ValueError, r"x\[3, 1\] is nan"),
        (X, np.where(Y[7, 0] == Y, -np.inf, Y), {}, ValueError, r"y\[7, 0\] is -inf"),
        (np.float32(X), np.where(Y[7, 0] == Y, np.inf, Y).astype("f4"), {}, ValueError, "is inf"),
        (X * 1e200, Y, {}, ValueError, "magnitudes below"),
        (X.astype(int), Y, {}, ValueError, "x: dtype int64; expected float32 or float64"),
        (X, Y.astype(complex), {}, ValueError, "y: dtype complex128"),
        (X.astype(np.float16), Y, {}, ValueError, "x: dtype float16"),
        (torch.ones(4, 3, dtype=torch.int32), torch.ones(4, 3), {}, ValueError, "torch.int32"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), {}, ValueError, "on cpu, y on meta"),
        (*[torch.ones(4, 3, device="meta")] * 2, {}, ValueError, "on meta; expected a CPU or CUDA"),
        (X.tolist(), Y, {}, TypeError, "x: expected a numpy array or a torch tensor, got list"),
        (X, None, {}, TypeError, "y: expected a numpy array or a torch tensor, got NoneType"),
        (X, torch.from_numpy(Y), {}, TypeError, "one kind"),
        (X, Y, {"gap": 0}, ValueError, "gap=0: expected a positive number"),
        (X, Y, {"gap": -1e-3}, ValueError, "gap=-0.001"),
        (X, Y, {"gap": math.nan}, ValueError, "gap=nan"),
        (X, Y, {"gap": "1%"}, ValueError, "gap='1%'"),
        (X, Y, {"p": 3}, ValueError, "p=3: expected 1"),
        (X, Y, {"p": 1.0}, ValueError, "p=1.0: expected 1"),
        (X, Y, {"p": True}, ValueError, "p=True: expected 1"),
        (X, Y, {"threads": 0}, ValueError, "threads=0: expected at least 1"),
        (X, Y, {"max_bids": -1}, ValueError, "max_bids=-1"),
        (X, Y, {"max_bids": 1.5}, TypeError, "max_bids=1.5: expected an integer"),
    ],
)
def test_refuses_with_one_plain_line(x, y, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        emd(x, y, **options)
    assert "\n" not in str(caught.value)


def test_max_bids_warns_and_stays_honest() -> None:
    x, y = hard_pairs(300)["clusters of unequal mass"]
    for max_bids in (0, 1, 200, 2000):
        with pytest.warns(RuntimeWarning, match=f"max_bids={max_bids} reached"):
            found = emd(x, y, max_bids=max_bids)
        assert not found.converged
        assert found.bids <= max_bids
        assert np.array_equal(np.sort(found.assignment), np.arange(300))
        assert found.distance == pytest.approx(mean_distance(x, y, found.assignment))
        assert found.lower_bound <= exact(x, y) <= found.distance + 1e-12
        assert found.gap == pytest.approx(1 - found.lower_bound / found.distance)


def test_fine_gaps() -> None:
    x, y = hard_pairs(400)["offset 1e3"]
    truth = exact(x, y)
    for gap in (1e-5, 1e-9):
        found = emd(x, y, gap=gap)
        assert found.converged
        assert found.gap <= gap
        assert found.distance == pytest.approx(truth, rel=2 * gap)
    with pytest.warns(RuntimeWarning, match="finer than float64"):
        assert not emd(x, y, gap=1e-17).converged


def test_ctrl_c_ends_it() -> None:
    """A real SIGINT into a process that has minutes of work before it."""
    code = """
import numpy as np
from vitapack.kernels.emd import emd
x, y = np.random.default_rng(0).normal(size=(2, 2, 200_000, 3))
try:
    print("started", flush=True)
    emd(x, y, gap=1e-9, threads=2)
except KeyboardInterrupt:
    print("interrupted")
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        # A shell's background jobs ignore SIGINT, and their children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        # It takes 0.1 s on free cores; a minute is for busy ones.
        assert child.communicate(timeout=60)[0] == "interrupted\n"
    finally:
        child.kill()
    assert child.returncode == 0


def test_other_python_threads_run_meanwhile() -> None:
    x, y = hard_pairs(6000)["collinear"]
    ticks, done = 0, threading.Event()

    def work() -> None:
        emd(x, y, gap=1e-2, threads=1)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.wait(0.005):
        ticks += 1
    worker.join()
    assert ticks > 5


def test_memory_at_100k_points() -> None:
    code = """
import resource, numpy as np
from vitapack.kernels.emd import emd
rng = np.random.default_rng(0)
x = rng.normal(size=(100_000, 3)).astype(np.float32)
y = rng.normal(size=(100_000, 3)).astype(np.float32)
import warnings; warnings.simplefilter("ignore")
emd(x[:64], y[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
emd(x, y, max_bids=300_000, threads=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert float(out.stdout) < 50  # MiB; 200 bytes a point would be 19


def test_a_missing_build_is_said_in_one_line() -> None:
    code = """
import sys
sys.modules["vitapack._C"] = None
import numpy as np
from vitapack.kernels.emd import emd
try:
    emd(np.zeros((2, 3)), np.ones((2, 3)))
except ImportError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "setup.py build_ext --inplace" in out.stdout
    assert len(out.stdout.splitlines()) == 1


def square(side: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float) * side
    return vertices, np.array([[0, 1, 2], [0, 2, 3]])


@pytest.mark.parametrize("stratified", [False, True])
def test_samples_are_uniform_by_area(stratified: bool) -> None:
    vertices, faces = square()
    # A second square, three times the area, beside it; and a face of no area.
    more = np.concatenate([vertices, vertices * np.sqrt(3) + [5.0, 0.0, 0.0], vertices[:1]])
    faces = np.concatenate([faces, faces + 4, [[8, 8, 0]]])
    points = sample_surface(more, faces, 4000, seed=1, stratified=stratified)
    assert points.shape == (4000, 3)
    assert points.dtype == np.float64
    assert np.all(points[:, 2] == 0)
    small = points[points[:, 0] <= 1]
    # Binomial, 4 standard deviations; stratified sampling is tighter.
    assert abs(len(small) - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)
    counts = np.histogram2d(small[:, 0], small[:, 1], bins=5, range=[[0, 1], [0, 1]])[0]
    assert abs(counts - len(small) / 25).max() < 5 * np.sqrt(len(small) / 25)


def test_sampling_seeds_and_generators() -> None:
    mesh = square()
    first = sample_surface(*mesh, 64, seed=5)
    assert np.array_equal(first, sample_surface(*mesh, 64, seed=5))
    assert not np.array_equal(first, sample_surface(*mesh, 64, seed=6))
    generator = np.random.default_rng(5)
    assert np.array_equal(first, sample_surface(*mesh, 64, seed=generator))
    assert not np.array_equal(first, sample_surface(*mesh, 64, seed=generator))


def test_sampling_refuses_what_is_no_mesh() -> None:
    vertices, faces = square()
    with pytest.raises(ValueError, match=r"vertices: expected \(V, 3\)"):
        sample_surface(vertices[:, :2], faces, 5)
    with pytest.raises(ValueError, match=r"faces: expected \(F, 3\) integers"):
        sample_surface(vertices, faces.astype(float), 5)
    with pytest.raises(ValueError, match=r"indices 0\.\.9, but there are 4"):
        sample_surface(vertices, np.array([[0, 1, 9]]), 5)
    with pytest.raises(ValueError, match="area of 0"):
        sample_surface(vertices * 0, faces, 5)
    with pytest.raises(ValueError, match="count=0"):
        sample_surface(vertices, faces, 0)


def test_kd_order_makes_compact_runs() -> None:
    points = np.random.default_rng(0).random((1003, 3))
    order = _C.kd_order(points, 8)
    assert np.array_equal(np.sort(order), np.arange(1003))
    runs = points[order[:1000]].reshape(125, 8, 3)
    assert np.ptp(runs, axis=1).mean() < 0.35  # random runs of 8 have 0.78


def test_stratified_floor_is_lower_and_debiasing_finds_a_shift() -> None:
    mesh = square()
    floors = {}
    for stratified in (False, True):
        clouds = [sample_surface(*mesh, 500, seed=seed, stratified=stratified) for seed in range(8)]
        floors[stratified] = emd_floor(
            clouds[0], np.stack(clouds[1:4]), clouds[4], np.stack(clouds[5:])
        )
    plain, strata = floors[False], floors[True]
    assert plain.draws.shape == (3,)
    assert plain.mean == pytest.approx(plain.draws.mean())
    assert plain.deviation == pytest.approx(plain.draws.std(ddof=1))
    assert strata.mean < plain.mean / 1.2

    x, again = clouds[0], np.stack(clouds[1:4])
    unchanged = debiased_emd(x, clouds[4], again)
    moved = debiased_emd(x, clouds[4] + [0.0, 0.0, 0.1], again)
    assert unchanged.raw == emd(x, clouds[4]).distance
    assert unchanged.distance < moved.distance / 3
    assert moved.distance == math.sqrt(moved.raw**2 - moved.floor.mean**2)
    assert moved.distance == pytest.approx(0.1, rel=0.1)
    on_torch = debiased_emd(*map(torch.from_numpy, (x, clouds[4], again)))
    assert on_torch.raw == unchanged.raw
    assert on_torch.floor.mean == unchanged.floor.mean
    with pytest.raises(ValueError, match="go together"):
        emd_floor(x, again, clouds[4])
