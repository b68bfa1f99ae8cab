"""Times the GEMM configurations on this machine's GPU and keeps the fastest correct one.

`vitapack tune` is the command, `gemm_table.save` writes the cache. Each candidate must reproduce
the reference before it is timed: compilers have bugs at single tile sizes, and a fast wrong kernel
would win. Also runs in Triton's interpreter (TRITON_INTERPRET=1); its times mean nothing there.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vitapack.kernels.linear import gemm_table, reference, weights
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.gemm_table import Choice
from vitapack.kernels.linear.gpu_ops import ops, run_choice
from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.triton_gemm import Tile

log = logging.getLogger("vitapack.kernels")
Report = Callable[[int, int, str], None]  # done, total, name of the GEMM
# Errors of compilers and drivers for one configuration: too large for this chip, or rejected.
REFUSALS = ("OutOfResources", "PTXASError", "CompilationError", "SplitWords")

L2_BYTES = 256 << 20  # larger than the L2 cache of any GPU
# Twelve hand-picked tiles: few enough to compile in a minute or two, and wide enough in shape that
# the best of published tables lies near one of them. (bm, bn, warps, stages); bk follows the op.
TILES = (
    (16, 64, 4, 4), (16, 128, 4, 4), (32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3),
    (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4),
    (128, 256, 8, 3), (256, 64, 8, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One linear: N outputs, K inputs and its weight layout."""

    n: int
    k: int
    layout: WeightLayout


def candidates(op: str, m: int) -> Iterator[Choice]:
    """Configurations to try in addition to the shipped one, without tiles much taller than M."""
    for how in gemm_table.hows(op):
        if how != "fused":
            yield Choice(how, None, "candidate")
    for bm, bn, warps, stages in TILES:
        if bm <= max(32, 2 * m):
            for bk in (64, 128):
                yield Choice("fused", Tile(bm, bn, bk, warps, stages), "candidate")


def tune(
    device: torch.device,
    shapes: list[Shape],
    rows: list[int],
    computes: tuple[str, ...] = ("a16", "a8"),
    *,
    again: bool = False,
    repeats: int = 9,
    report: Report = lambda done, total, what: None,
) -> dict[str, dict[str, object]]:
    """Tunes each linear for each row count and compute, with and without gate, saving each result.

    Returns the new choices: {key: {"how", "tile", "us", "default_us"}}. Keys already in the cache
    are skipped unless `again`, so an interrupted run can continue; GEMMs that do not fit into GPU
    memory are skipped too. Raises ValueError on hardware without kernels, RuntimeError if no
    candidate is correct.
    """
    arch, name = gemm_table.properties(device.index)
    if gemm_table.table_arch(arch) is None:
        raise ValueError(f"no kernels for compute capability sm_{arch}: nothing to tune")
    known = {} if again else gemm_table.cached(arch, name)
    jobs = []
    for shape in dict.fromkeys(shapes):
        for m in sorted({gemm_table.bucket(m) for m in rows}):
            for compute in computes:
                for gate in (False, True):
                    op = gemm_table.op_name(shape.layout, compute, gate)
                    key = gemm_table.key_of(op, m, shape.n, shape.k, shape.layout.group)
                    if key not in known:
                        jobs.append((key, op, shape, m, gate))
    chosen = {}
    for number, (key, op, shape, m, gate) in enumerate(jobs):
        report(number, len(jobs), key)
        try:
            # Events are recorded on the current device, which may be another one.
            with torch.cuda.device(device if device.type == "cuda" else -1):
                best, row = _fastest(device, op, shape, m, gate, repeats)
        except torch.cuda.OutOfMemoryError:
            log.warning("%s: no memory left on the GPU; not tuned", key)
            continue
        gemm_table.save(arch, name, {key: best}, {key: row})
        chosen[key] = row
    report(len(jobs), len(jobs), "tuned")
    return chosen


def _fastest(
    device: torch.device, op: str, shape: Shape, m: int, gate: bool, repeats: int
) -> tuple[Choice, dict[str, object]]:
    """The fastest correct candidate, and its record."""
    call, expected = _problem(device, op, shape, m, gate)
    default = gemm_table.default_choice(op, gemm_table.arch_of(device), m)
    assert default is not None
    size = expected.abs().max().item() + 1e-30
    times: dict[Choice, float] = {}
    for choice in dict.fromkeys([default, *candidates(op, m)]):
        try:
            out = call(choice)
        except Exception as error:
            if type(error).__name__ not in REFUSALS:
                raise
            continue
        # fp16 output rounds by 5e-4, fp16 scratch weights by as much again.
        if not (out.float() - expected).abs().max().item() <= 2e-3 * size:
            continue
        times[choice] = _time(lambda choice=choice: call(choice), device, repeats)  # type: ignore[misc]
    if not times:
        raise RuntimeError(f"{op} {m} rows {shape}: no candidate agrees with the reference")
    best = min(times, key=lambda choice: times[choice])
    row: dict[str, object] = {
        "how": best.how, "tile": str(best.tile), "us": times[best],
        "default_us": times.get(default), "tried": len(times),
    }  # fmt: skip
    return best, row


def _problem(
    device: torch.device, op: str, shape: Shape, m: int, gate: bool
) -> tuple[Callable[[Choice], Tensor], Tensor]:
    """A random GEMM as a function of the choice, and its expected float32 result."""
    rng = torch.Generator().manual_seed(0)
    n, k = shape.n, shape.k
    x = torch.randn(m, k, generator=rng).to(device).half()
    scale = torch.rand(n, generator=rng) * 1e-3 + 1e-4
    bias = torch.randn(n, generator=rng).to(device).half()
    residual = torch.randn(m, n, generator=rng).to(device).half() if gate else None
    gates = torch.randn(1, n, generator=rng).to(device).half() if gate else None
    weight = _random_weight(shape, scale, rng).to(device)
    first, sx = ops.join(None, x, False, True) if "a8" in op else (x, None)
    sx = None if sx is None else sx.flatten()
    epilogue = Epilogue(bias, None, residual, gates, m)
    expected = reference.gemm_ref(first, sx, weight, epilogue, torch.float32)

    def call(choice: Choice) -> Tensor:
        return run_choice(choice, first, sx, weight, epilogue, torch.float16)

    return call, expected


def _random_weight(shape: Shape, scale: Tensor, rng: torch.Generator) -> weights.PackedWeight:
    """A weight of random codes (groups: s = 8, z mid-range) whose padding expands to 0."""
    layout, n, k = shape.layout, shape.n, shape.k
    low, high, middle = -layout.largest, layout.largest + 1, layout.largest // 2
    group = None
    if layout.group:
        low = 0
        group = torch.full((n, layout.groups(k)), 7 << 4 | middle, dtype=torch.uint8)
    dtype = weights.DTYPES[layout.dtype]
    codes = torch.randint(low, high, (n, layout.padded(k)), dtype=dtype, generator=rng)
    codes[:, k:] = middle
    return weights.from_codes(layout, k, codes, scale, group)


def _time(call: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median microseconds per call."""
    if device.type == "cuda":
        return statistics.median(kernel_us(call, repeats))
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def kernel_us(call: Callable[[], object], count: int) -> list[float]:
    """Microseconds of single calls on the current GPU, after two warm-up calls.

    L2 is flushed before each call, since in a generation a weight was last read one denoising step
    ago. No call waits for the host, which enqueues all of them while the GPU sleeps: a launch takes
    some 50 us of Python, as long as a small GEMM, and would make all candidates look equal.
    """
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    # In cycles, at most 2 per nanosecond; twice the time that the host should need.
    torch.cuda._sleep(int(4e9 * count * (host + 1e-4)))
    for first, last in events:
        flush.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return [1e3 * first.elapsed_time(last) for first, last in events]
