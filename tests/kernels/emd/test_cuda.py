"""csrc/emd/auction.cu executed on the CPU, thread by thread, through cuda_on_cpu.h.

What is shown here: the kernels' logic, their independence of the order of threads and of the number
of blocks, and that the harness notices when barriers or masks are wrong. Nothing here was timed.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from emd_clouds import diagonal, dual_bound, exact, hard_pairs, mean_distance

from vitapack.kernels.emd import cuda as emd_cuda
from vitapack.kernels.emd.cuda import open_library, solve_with
from vitapack.kernels.emd.solve import emd

HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "csrc" / "emd" / "auction.cu"
FORWARD, REVERSED, RANDOM = 0, 1, 12345
HARD = hard_pairs(70)

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU"
)


def compile_for_cpu(source: Path, library: Path, optimise: str = "-O1") -> ctypes.CDLL:
    command = ["g++", "-x", "c++", "-std=c++17", optimise, "-fPIC", "-shared", "-Wall", "-Werror"]
    command += [
        "-fvisibility=hidden",
        "-DCUDA_ON_CPU",
        f"-I{HERE}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return open_library(library)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_cpu(SOURCE, tmp_path_factory.mktemp("emd") / "libemd_cpu.so")


def run(
    library: ctypes.CDLL, x: np.ndarray, y: np.ndarray, order: int = FORWARD, **options
) -> dict:
    """Arrays for (B, n, 3) or one pair; 64 threads a block, since a fiber stands for each."""
    library.cuda_on_cpu_order(order)
    settings = dict(p=1, gap=1e-2, max_bids=None, prices=True, blocks=0, threads=64) | options
    tensors = [torch.from_numpy(c if c.ndim == 3 else c[None]) for c in (x, y)]
    # Fills memory that nothing has been written to, the workspace above all, with 0xff or NaN.
    torch.use_deterministic_algorithms(True)
    try:
        found = solve_with(library, *tensors, **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: value.numpy() for name, value in found.items()}


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def assert_certified(x: np.ndarray, y: np.ndarray, found: dict, gap: float, p: int = 1) -> None:
    truth, d = exact(x, y, p), diagonal(x, y)
    assignment = found["assignment"][0]
    distance, bound = found["distance"][0], found["lower_bound"][0]
    assert np.array_equal(np.sort(assignment), np.arange(len(x)))
    recomputed = mean_distance(x, y, assignment, p)
    assert distance == pytest.approx(recomputed, rel=1e-12, abs=1e-15 * d)
    assert bound <= truth + 1e-12 * d
    assert distance >= truth - 1e-12 * d
    assert found["converged"][0]
    assert distance - bound <= gap * max(distance, 1e-6 * d) + 1e-15 * d
    prices = found["prices"][0]
    scale = max(d**p, float(np.abs(prices).max()))
    assert bound**p == pytest.approx(dual_bound(x, y, prices, p) ** p, abs=1e-13 * scale)


@pytest.mark.parametrize("name", HARD)
def test_certified_and_independent_of_order_and_blocks(kernels: ctypes.CDLL, name: str) -> None:
    x, y = HARD[name]
    forward = run(kernels, x, y)
    assert_certified(x, y, forward, 1e-2)
    # Cooperative: three blocks that meet at grid barriers.
    assert same(forward, run(kernels, x, y, REVERSED, blocks=3))


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 65])
def test_odd_sizes(kernels: ctypes.CDLL, n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 3))
    for p in (1, 2):
        found = run(kernels, x, y, p=p)
        assert_certified(x, y, found, 1e-2, p)
        assert same(found, run(kernels, x, y, REVERSED, p=p, blocks=2))


def test_fine_gap_goes_on_in_float64(kernels: ctypes.CDLL) -> None:
    x, y = hard_pairs(150)["scale 1e6"]
    for p in (1, 2):
        found = run(kernels, x, y, gap=1e-8, p=p)
        assert_certified(x, y, found, 1e-8, p)
        assert same(found, run(kernels, x, y, RANDOM, gap=1e-8, p=p, blocks=2))


def test_a_pair_does_not_depend_on_its_neighbours(kernels: ctypes.CDLL) -> None:
    pairs = [hard_pairs(70)[name] for name in ("scale 1e6", "collinear", "identical")]
    x, y = (np.stack(clouds) for clouds in zip(*pairs, strict=True))
    for order in (FORWARD, REVERSED):
        batch = run(kernels, x, y, order)
        for b, (first, second) in enumerate(pairs):
            single = run(kernels, first, second, blocks=-1)  # its own choice: cooperative
            assert all(np.array_equal(single[name][0], batch[name][b]) for name in single)


@pytest.mark.parametrize("threads", [16, 96, 1024])
def test_refuses_blocks_that_cannot_form_teams(kernels: ctypes.CDLL, threads: int) -> None:
    with pytest.raises(RuntimeError, match="invalid value"):
        run(kernels, *HARD["collinear"], threads=threads)


def test_a_missing_library_is_said_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emd_cuda, "LIBRARY", tmp_path / "libvitapack_cuda.so")
    emd_cuda._installed.cache_clear()
    with pytest.raises(ImportError, match=r"not built.*VITAPACK_CUDA=1 pip install") as caught:
        emd_cuda._installed()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_reports_no_spills_and_no_warnings(tmp_path: Path) -> None:
    command = ["nvcc", "-O3", "-std=c++17", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-arch=sm_80", "-o", str(tmp_path / "emd.cubin"), str(SOURCE)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert report.count("Compiling entry function") == 4
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0")] * len(spills)
    assert len(spills) >= 4
    # 512 threads of up to 128 registers fill the 65,536 of a multiprocessor.
    assert all(int(used) <= 128 for used in re.findall(r"Used (\d+) registers", report))


@pytest.mark.skipif(
    not emd_cuda.LIBRARY.is_file() or torch.cuda.is_available(),
    reason="needs the library built, on a machine without a GPU",
)
def test_the_built_library_reports_that_there_is_no_gpu() -> None:
    """Loads what nvcc built and goes up to its first CUDA call, whose error must come through."""
    with pytest.raises(RuntimeError, match=r"the CUDA solver failed with code \d+: \w+"):
        solve_with(
            open_library(emd_cuda.LIBRARY),
            *torch.rand(2, 1, 40, 3),
            p=1,
            gap=1e-2,
            max_bids=None,
            prices=False,
        )


def test_a_batch_too_large_for_the_workspace_goes_in_turns(
    kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = np.random.default_rng(0).random((2, 3, 40, 3))
    whole = run(kernels, x, y)
    monkeypatch.setattr(emd_cuda, "_WORKSPACE_BYTES", 2 * kernels.vitapack_emd_workspace(40, 1))
    assert same(whole, run(kernels, x, y))
    monkeypatch.setattr(emd_cuda, "_WORKSPACE_BYTES", 1)
    assert same(whole, run(kernels, x, y))


def test_agrees_with_the_cpu_solver(kernels: ctypes.CDLL) -> None:
    """1100 points are 35 leaves: more than a warp bounds at once."""
    x, y = hard_pairs(1100)["offset 1e3"]
    found, other = run(kernels, x, y, gap=0.5), emd(x, y, gap=0.5)
    assert same(found, run(kernels, x, y, REVERSED, gap=0.5, blocks=2))
    assert found["lower_bound"][0] <= other.distance
    assert other.lower_bound <= found["distance"][0]
    assert found["distance"][0] == pytest.approx(mean_distance(x, y, found["assignment"][0]))


@pytest.mark.parametrize("max_bids", [0, 1, 40, 150])
def test_max_bids_leaves_a_permutation_and_an_honest_gap(
    kernels: ctypes.CDLL, max_bids: int
) -> None:
    x, y = hard_pairs(70)["clusters of unequal mass"]
    found = run(kernels, x, y, max_bids=max_bids)
    assert found["bids"][0] <= max_bids
    assert not found["converged"][0]
    assert np.array_equal(np.sort(found["assignment"][0]), np.arange(len(x)))
    assert found["distance"][0] == pytest.approx(mean_distance(x, y, found["assignment"][0]))
    assert found["lower_bound"][0] <= exact(x, y) + 1e-12
    assert same(found, run(kernels, x, y, RANDOM, max_bids=max_bids, blocks=3))


def test_all_points_the_same(kernels: ctypes.CDLL) -> None:
    x = np.full((40, 3), 0.1, np.float32)
    found = run(kernels, x, x)
    assert found["distance"][0] == 0
    assert found["converged"][0]
    assert np.array_equal(np.sort(found["assignment"][0]), np.arange(40))


# What is wrong: (a pattern that occurs once in the source, what replaces it, who must notice).
# Where memory is read that nobody has written, it may be anyone.
PLANTED = {
    "bids are read before all are made": (
        r"      if \(team > 1\) break;\n    \}\n    group\.sync\(\);",
        "      if (team > 1) break;\n    }",
        "",
    ),
    "counts are read while others still write them": (
        r"shared\.counts\[warp\] = __popc\(mask\);\n    __syncthreads\(\);",
        "shared.counts[warp] = __popc(mask);",
        "",
    ),
    "teams merge before their members are done": (
        r"(team_second_at\[warp\] = best\.second_at;\n        \})\n        __syncthreads\(\);",
        r"\1",
        "order",
    ),
    "one lane alone at a barrier": (
        r"if \(lane\(\) == 0\) shared\.counts\[warp\] = __popc\(mask\);\n    __syncthreads\(\);",
        "if (lane() == 0) { shared.counts[warp] = __popc(mask); __syncthreads(); }",
        "harness",
    ),
    "half a warp in a shuffle of all": (
        r"\n(  T low = view\.objects\[leaf \* 32 \+ lane\(\)\]\.price;)",
        r"\n  if (lane() >= 16) return;\n\1",
        "harness",
    ),
    "a grid barrier that only one block reaches": (
        r"      if \(!group\.leads\(\)\) break;\n",
        "      if (!group.leads()) return;\n",
        "harness",
    ),
    "the last bid wins, not the highest": (
        r"atomicMax\(&lists\.key\[j\], key\)",
        "lists.key[j] = key",
        "order",
    ),
    "a lost bid is not made again": (
        r"lists\.out\[b\] = i;",
        "lists.out[b] = -1;",
        "certificate",
    ),
    "the last leaf is never looked at": (
        r"if \(leaf < view\.leaves\) \{",
        "if (leaf < view.leaves - 1) {",
        "",
    ),
    "the certificate skips the last person": (
        r"i < view\.n; i \+= group\.warps\(\)\) \{\n    const int mine",
        "i < view.n - 1; i += group.warps()) {\n    const int mine",
        "",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_harness_notices(bug: str, tmp_path: Path) -> None:
    pattern, replacement, notices = PLANTED[bug]
    text = SOURCE.read_text()
    assert len(re.findall(pattern, text)) == 1, "the planted bug no longer fits the source"
    broken = tmp_path / "broken.cu"
    text = re.sub(pattern, replacement, text)
    broken.write_text(re.sub(r"solve<(float|double), 2>", r"solve<\1, 1>", text))  # half to compile
    library = compile_for_cpu(broken, tmp_path / "libbroken.so", "-O0")
    verdict = in_a_child(lambda: verdict_on(library))
    assert verdict != "nobody"
    assert verdict.startswith(notices)


def verdict_on(library: ctypes.CDLL) -> str:
    """Who notices that something is wrong, and what they say."""
    x, y = hard_pairs(40)["few points repeated"]
    try:
        first = run(library, x, y, FORWARD, gap=0.05, max_bids=2_000)
        assert_certified(x, y, first, 0.05)
        for order, blocks in ((REVERSED, 0), (RANDOM, 2)):
            if not same(first, run(library, x, y, order, gap=0.05, blocks=blocks, max_bids=2_000)):
                return "order: the result depends on it"
    except RuntimeError as error:
        return f"{'harness' if 'code' in str(error) else 'certificate'}: {error}"
    except (AssertionError, IndexError) as error:
        return f"certificate: {error}"
    return "nobody"


def in_a_child(work: Callable[[], str]) -> str:
    """What `work` returns, or the signal that ended it: a planted bug may write anywhere."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        verdict = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return verdict or f"harness: ended by signal {os.waitstatus_to_exitcode(status)}"


def test_the_unbroken_source_passes_the_same_check(kernels: ctypes.CDLL) -> None:
    assert in_a_child(lambda: verdict_on(kernels)) == "nobody"


built = pytest.mark.skipif(
    not emd_cuda.LIBRARY.is_file(), reason="the CUDA library is not built: no nvcc was there"
)


@built
@pytest.mark.gpu
@pytest.mark.parametrize("name", HARD)
def test_on_a_gpu(name: str) -> None:
    x, y = (torch.from_numpy(cloud).cuda() for cloud in HARD[name])
    single = emd(x, y, return_prices=True)
    assert single.distance.device == x.device
    found = {k: v.cpu().numpy()[None] for k, v in vars(single).items()}
    assert_certified(*HARD[name], found, 1e-3)
    batch = emd(torch.stack([x] * 9), torch.stack([y] * 9), return_prices=True)
    assert torch.equal(batch.assignment, single.assignment.expand(9, -1))
    assert torch.equal(batch.distance, single.distance.expand(9))


@built
@pytest.mark.gpu
def test_a_large_pair_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 100_000, 3, generator=generator).cuda()
    found = emd(x, y, gap=1e-2)
    assert bool(found.converged)
    assert torch.equal(found.assignment.sort().values.cpu(), torch.arange(100_000))
