"""Earth Mover's Distance between point clouds of equal size, exact up to a certified gap.

    result = emd(x, y)            # (N, 3) or (B, N, 3), numpy or torch, CPU or CUDA
    result.distance, result.lower_bound, result.assignment

EMD(x, y) = min over permutations of (1/N) sum_i ||x_i - y_perm(i)||, solved by an auction in
csrc/emd/auction.cpp (CPU) and csrc/emd/auction.cu (CUDA). docs/emd.md has the definition, the
certificate and measured figures. The vitality of a block is measured with `debiased_emd` and
`sample_surface`.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

_BUILD_HINT = (
    "the compiled part vitapack._C is not built; build it with `pip install -e .` or "
    "`python setup.py build_ext --inplace` in the checkout (needs a C++17 compiler)"
)
# The square of a larger coordinate could overflow float64.
_LARGEST = 1e150
# Passed to the solver for max_bids=None. An auction with positive epsilon always ends.
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class EMDResult:
    """Result of `emd`: for (B, N, 3) input the fields have shape (B,) or (B, N).

    For (N, 3) input the B axis is absent. Fields are numpy arrays for numpy input, and tensors on
    the input's device for torch input.
    """

    distance: Any  # float64: mean distance of `assignment`; for p=2 the root mean square
    assignment: Any  # int64 (B, N): a permutation: x[i] goes to y[assignment[i]]
    lower_bound: Any  # float64: no assignment is shorter; the dual at the auction's prices
    gap: Any  # float64: (distance - lower_bound) / distance, 0 if distance is 0
    converged: Any  # bool: distance - lower_bound <= gap * max(distance, 1e-6 * D)
    bids: Any  # int64: bids made
    phases: Any  # int64: epsilon phases run
    prices: Any = None  # float64 (B, N), of the points of y, or None; see `emd`


@dataclass(frozen=True)
class EMDFloor:
    """The EMD between independent samplings of the same surfaces: the value of "no change"."""

    mean: float
    deviation: float  # standard deviation over the draws, 0 for a single draw
    draws: np.ndarray  # float64 (K,)


@dataclass(frozen=True)
class DebiasedEMD:
    """A distance with its sampling noise removed in quadrature, and the two values behind it."""

    distance: float  # sqrt(max(0, raw^2 - floor^2))
    raw: float
    floor: EMDFloor


def emd(
    x: Any,
    y: Any,
    *,
    p: int = 1,
    gap: float = 1e-3,
    max_bids: int | None = None,
    threads: int | None = None,
    return_prices: bool = False,
) -> EMDResult:
    """Solves min over permutations of (1/N) sum ||x_i - y_perm(i)|| to a certified relative gap.

    x, y: (N, 3) or (B, N, 3), float32 or float64, numpy or torch; N >= 1, B >= 0. Not
    differentiable. p=2 gives sqrt(min (1/N) sum ||x_i - y_perm(i)||^2) instead. A pair is solved
    when distance - lower_bound <= gap * max(distance, 1e-6 * D), with D the diagonal of the
    bounding box. `max_bids` stops a pair early: its assignment is completed greedily, `converged`
    is False, and a RuntimeWarning is issued. `threads` solve different pairs (default: the cores
    that this process may use; ignored on CUDA). The result is bit-identical for any number of
    threads and does not depend on the other pairs of the batch.

    With `return_prices` the bound can be checked independently, in units of the cost ||.||^p:
    mean_i min_j (cost_ij + price_j) - mean_j price_j >= lower_bound^p, with a rounding margin of 8
    (CUDA: 16) float64 epsilons of the sum of both means.

    Raises ValueError for wrong shapes or dtypes, NaN or infinity, options out of range and mixed
    devices; TypeError if an input is not an array; ImportError if the compiled module is not
    built; KeyboardInterrupt within a second of Ctrl-C (CPU).
    """
    if isinstance(p, bool) or not isinstance(p, int | np.integer) or p not in (1, 2):
        raise ValueError(f"p={p!r}: expected 1 (mean distance) or 2 (root mean square)")
    if not _is_number(gap) or not math.isfinite(gap) or gap <= 0:
        raise ValueError(f"gap={gap!r}: expected a positive number, such as 1e-3")
    _check_count("max_bids", max_bids, 0)
    _check_count("threads", threads, 1)
    on_torch = _check_arrays(x, y)
    single = x.ndim == 2
    if single:
        x, y = x[None], y[None]

    result: dict[str, Any]
    if on_torch and x.device.type != "cpu":
        from vitapack.kernels.emd.cuda import solve_cuda

        result = solve_cuda(
            x.detach(), y.detach(), p=p, gap=float(gap), max_bids=max_bids, prices=return_prices
        )
    else:
        if on_torch:
            x, y = x.detach().numpy(), y.detach().numpy()
        dtype = np.result_type(x.dtype, y.dtype)
        result = _compiled().emd_auction(
            np.ascontiguousarray(x, dtype=dtype),
            np.ascontiguousarray(y, dtype=dtype),
            p=p,
            gap=float(gap),
            max_bids=_NO_LIMIT if max_bids is None else max_bids,
            threads=_available_cores() if threads is None else threads,
            prices=return_prices,
        )
        if on_torch:
            import torch

            result = {k: None if v is None else torch.from_numpy(v) for k, v in result.items()}
    distance: Any = result["distance"]
    lower_bound: Any = result["lower_bound"]
    # Costs are not negative, so a distance of 0 has the bound 0.
    result["gap"] = (distance - lower_bound) / (distance + (distance == 0))
    _warn_if_open(result, gap, max_bids)
    if single:
        result = {name: None if value is None else value[0] for name, value in result.items()}
    return EMDResult(**result)


def emd_floor(x: Any, x_again: Any, y: Any = None, y_again: Any = None, **options: Any) -> EMDFloor:
    """Measures the EMD between samplings of unchanged surfaces: (EMD(x,x') + EMD(y,y')) / 2.

    x, y: (N, 3). x_again, y_again: (N, 3) or (K, N, 3), further independent samplings of the same
    surfaces; K draws are averaged (one draw is noisy: take 3 or more). Without y, only x is used.
    `options` as in `emd`; pass the ones used for the raw distance.
    """
    if (y is None) != (y_again is None):
        raise ValueError("emd_floor: y and y_again go together; one of them is missing")
    draws = _self_distances("x", x, x_again, options)
    if y is not None:
        others = _self_distances("y", y, y_again, options)
        if len(draws) != len(others):
            raise ValueError(
                f"x_again has {len(draws)} draws, y_again {len(others)}; expected equally many"
            )
        draws = (draws + others) / 2
    deviation = float(draws.std(ddof=1)) if len(draws) > 1 else 0.0
    return EMDFloor(mean=float(draws.mean()), deviation=deviation, draws=draws)


def debiased_emd(x: Any, y: Any, x_again: Any, y_again: Any = None, **options: Any) -> DebiasedEMD:
    """EMD(x, y) less its sampling floor, in quadrature: sqrt(max(0, raw^2 - floor^2)).

    Two random samplings of one surface are about 0.03 apart at N=10,000 in [-1, 1]; quadrature
    tracks the distance of the surfaces better than plain subtraction does. The clamp at 0 is never
    silent: `raw` and `floor` are returned too, and a change within two `floor.deviation` of the
    floor is noise. Arguments as in `emd_floor`; without y_again the floor is that of x alone.
    """
    raw = float(emd(x, y, **options).distance)
    if y_again is None:
        floor = emd_floor(x, x_again, **options)
    else:
        floor = emd_floor(x, x_again, y, y_again, **options)
    return DebiasedEMD(distance=math.sqrt(max(0.0, raw**2 - floor.mean**2)), raw=raw, floor=floor)


def sample_surface(
    vertices: np.ndarray,
    faces: np.ndarray,
    count: int,
    *,
    seed: int | np.random.Generator = 0,
    stratified: bool = True,
) -> np.ndarray:
    """Samples `count` points, uniform by area, from a triangle mesh: float64 (count, 3).

    vertices: (V, 3) floats; faces: (F, 3) integers. Stratified sampling draws 8 * count points,
    sorts them in kd order and keeps a random one of each run of 8: each point is still uniform on
    the surface, but the EMD floor between two samplings is 1.4 to 1.8 times lower. A Generator as
    `seed` is advanced. Raises ValueError for wrong shapes or indices, or a mesh without area.
    """
    vertices, faces = np.asarray(vertices), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or vertices.dtype.kind not in "fiu":
        raise ValueError(f"vertices: expected (V, 3) numbers, got {_describe(vertices)}")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise ValueError(f"faces: expected (F, 3) integers, got {_describe(faces)}")
    _check_count("count", count, 1)
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError(
            f"faces: indices {faces.min()}..{faces.max()}, but there are {len(vertices)} vertices"
        )
    corners = vertices.astype(np.float64)[faces]  # (F, 3 corners, 3)
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    total = areas.sum()
    if not np.isfinite(total) or total <= 0:
        raise ValueError(f"the mesh's {len(faces)} faces have an area of {total}; cannot sample it")

    generator = np.random.default_rng(seed)
    drawn = 8 * count if stratified else count
    # searchsorted over the cumulative areas never selects a face without area.
    edge = np.cumsum(areas)
    face = np.searchsorted(edge, generator.random(drawn) * edge[-1], side="right")
    face = np.minimum(face, np.flatnonzero(areas)[-1])
    root, along = np.sqrt(generator.random((drawn, 1))), generator.random((drawn, 1))
    points = corners[face, 0] + root * ((1 - along) * edges[face, 0] + along * edges[face, 1])
    if not stratified:
        return points
    runs = _compiled().kd_order(points, 8).reshape(count, 8)
    return points[runs[np.arange(count), generator.integers(0, 8, count)]]


def _self_distances(name: str, cloud: Any, again: Any, options: dict[str, Any]) -> np.ndarray:
    if getattr(cloud, "ndim", 2) != 2:
        raise ValueError(f"{name}: expected one cloud (N, 3), got shape {tuple(cloud.shape)}")
    if getattr(again, "ndim", 2) == 3:
        if again.shape[0] == 0:
            raise ValueError(f"{name}_again: no draws; expected (K, N, 3) with K >= 1")
        if isinstance(cloud, np.ndarray):
            cloud = np.broadcast_to(cloud, (again.shape[0], *cloud.shape))
        elif hasattr(cloud, "expand"):
            cloud = cloud.expand(again.shape[0], *cloud.shape)
    distances = emd(cloud, again, **options).distance
    if not isinstance(distances, np.ndarray | np.floating):
        distances = distances.cpu().numpy()
    return np.atleast_1d(np.asarray(distances, dtype=np.float64))


def _compiled() -> Any:
    """The C++ module. Raises ImportError with build instructions if it is missing."""
    try:
        from vitapack import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(_BUILD_HINT) from error
    return _C


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_count(name: str, value: Any, smallest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r}: expected an integer or None")
    if value < smallest:
        raise ValueError(f"{name}={value}: expected at least {smallest}")


def _describe(array: Any) -> str:
    return f"shape {tuple(array.shape)}, dtype {array.dtype}"


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # there are no tensors before torch is imported
    return torch is not None and isinstance(value, torch.Tensor)


def _check_arrays(x: Any, y: Any) -> bool:
    """Raises unless x and y are a pair of clouds. Returns whether they are torch tensors."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, np.ndarray) and not _is_tensor(value):
            raise TypeError(
                f"{name}: expected a numpy array or a torch tensor, got {type(value).__name__}"
            )
    on_torch = _is_tensor(x)
    if on_torch != _is_tensor(y):
        raise TypeError(
            "x and y: one is a numpy array, the other a torch tensor; expected one kind"
        )
    for name, value in (("x", x), ("y", y)):
        if str(value.dtype).removeprefix("torch.") not in ("float32", "float64"):
            raise ValueError(f"{name}: dtype {value.dtype}; expected float32 or float64")
        if value.ndim not in (2, 3) or value.shape[-1] != 3:
            raise ValueError(
                f"{name}: expected shape (N, 3) or (B, N, 3), got {tuple(value.shape)}"
            )
        if value.shape[-2] == 0:
            raise ValueError(f"{name}: shape {tuple(value.shape)} has no points; expected N >= 1")
    if tuple(x.shape) != tuple(y.shape):
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; expected equal shapes")
    if on_torch and x.device != y.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}; expected one device")
    if on_torch and x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"x and y are on {x.device}; expected a CPU or CUDA device")
    for name, value in (("x", x), ("y", y)):
        _check_values(name, value, on_torch)
    return on_torch


def _check_values(name: str, value: Any, on_torch: bool) -> None:
    # A fast test without a mask: the largest magnitude is NaN if any coordinate is.
    if on_torch:
        value = value.detach()
    if math.prod(value.shape) == 0:
        return
    if float(abs(value).max()) <= _LARGEST:
        return
    if on_torch:
        value = value.cpu().numpy()
    bad = ~(np.abs(value, dtype=np.float64) <= _LARGEST)
    at = tuple(int(k) for k in np.unravel_index(int(bad.argmax()), bad.shape))
    number = value[at]
    if math.isfinite(number):
        raise ValueError(f"{name}{list(at)} is {number}; expected magnitudes below {_LARGEST:g}")
    raise ValueError(f"{name}{list(at)} is {number}; expected finite coordinates")


def _warn_if_open(result: dict[str, Any], gap: float, max_bids: int | None) -> None:
    open_pairs = [b for b, ok in enumerate(result["converged"].tolist()) if not ok]
    if not open_pairs:
        return
    worst = max(float(result["gap"][b]) for b in open_pairs)
    reason = (
        "gap is finer than float64 certifies"
        if max_bids is None
        else f"max_bids={max_bids} reached"
    )
    warnings.warn(
        f"emd: {len(open_pairs)} of {len(result['converged'])} pairs not solved to gap={gap:g} "
        f"({reason}); first pair {open_pairs[0]}, largest gap {worst:.3g}",
        RuntimeWarning,
        stacklevel=3,
    )
