"""Quantizers by name: float weights to the integers of a packed layout (docs/format.md).

    quantizer = QUANTIZERS["search"]()
    weight = quantizer.quantize("blocks.0.mlp.0", w, LAYOUTS["w4-b64-g32-v1"])    # PackedWeight

Without groups a layout is symmetric per output channel: w = scale[n] * code. A group of
G inputs has a small integer scale s and a zero point z, in addition to the channel's float scale:
w = scale[n] * s * (code - z). The values of a group are thus multiples of scale * s, and z only
determines which of them the codes can represent.
"rtn" rounds to the nearest code after covering each group's range. "search" minimises the squared
error of each row over the channel scale, s and z, then fits the channel scale by least squares.
A calibrated quantizer is another subclass of Quantizer, which gets the model by `prepare`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.weights import (
    DTYPES,
    INT8_MAX,
    PackedWeight,
    from_codes,
    pack_group,
    unpack_group,
)
from vitapack.runtime.errors import UserError

# Rows are searched in blocks of about this many weights, so that a block stays in the L2 cache.
BLOCK_WEIGHTS = 1 << 17
# Step of a group relative to covering its range exactly. N(0, 1) in groups of 32 / 128 is best
# near 0.92 / 0.8; values below 0.6 never won, values over 1 do not clip and can round better.
CLIPS = (0.62, 0.7, 0.76, 0.82, 0.87, 0.91, 0.95, 1.0, 1.06)
# Channel scale relative to the one that gives the widest group s = 16; larger ones give it s = 15
# to 7. At 4 bits it needs s = 8 if its weights have one sign (15 codes times 8 is 120), else 15 or
# less to use all 16 codes inside +-127; below 1 it is clipped.
SCALES = (0.6, 0.75, 0.88, 1.0, *(16 / s for s in range(15, 6, -1)))
PEAKS = (0.9, 0.95, 1.0)  # channel scale relative to absmax / 127
CHANNEL_CLIPS = (1.0, 0.96, 0.91, 0.86, 0.8, 0.7, 0.6)
REFITS = 2  # rounds of least-squares scale + rounding; a third gains < 0.1 % of the error
TINY = torch.finfo(torch.float32).tiny
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Quantizer:
    """Chooses the integers of weights, one linear at a time."""

    def prepare(self, checkpoint: Any, calibration: Any) -> None:
        """Prepares a calibrated quantizer. Called once, before the first weight, with the original
        (families.Checkpoint) and the calibration images; by default does nothing."""

    def quantize(self, name: str, weight: Tensor, layout: WeightLayout) -> PackedWeight:
        """Quantizes a weight (N, K) of any float dtype to a packed layout; `name` is for messages.

        Raises UserError if it contains NaN or infinity.
        """
        raise NotImplementedError


class RoundToNearest(Quantizer):
    """Covers the range of each row or group with codes, then rounds."""

    def quantize(self, name: str, weight: Tensor, layout: WeightLayout) -> PackedWeight:
        w = _as_matrix(weight, name)
        if not layout.group:
            return _channels(w, _usable(w.abs().amax(1) / layout.largest), layout)
        grouped = _grouped(w, layout)  # (N, groups, G)
        step = _range_step(grouped, layout)
        # The channel scale is 1/16 of the widest step; s * 7 must reach the row's largest weight
        # inside +-127.
        scale = _usable(torch.maximum(step.amax(1) / 16, w.abs().amax(1) / INT8_MAX))
        s = (step / scale[:, None]).round_().clamp_(1, 16)
        z = (-grouped.amin(2).clamp(max=0) / (s * scale[:, None])).round_()
        return _groups(grouped, s, z.clamp_(0, layout.largest), scale, layout, w.shape[1])


class Search(Quantizer):
    """Minimises the squared error of each row, then fits its scale by least squares."""

    def quantize(self, name: str, weight: Tensor, layout: WeightLayout) -> PackedWeight:
        search = _search_groups if layout.group else _search_channels
        return _by_rows(_as_matrix(weight, name), lambda block: search(block, layout))


QUANTIZERS: dict[str, type[Quantizer]] = {"rtn": RoundToNearest, "search": Search}


def rounded(weight: Tensor, grid: PackedWeight) -> PackedWeight:
    """Rounds a weight (N, K) float32 with the scales and zero points of a packed one."""
    layout, scale = grid.layout, grid.scale
    if grid.group is None:
        return _channels(weight, scale, layout)
    s, z = (values.float() for values in unpack_group(grid.group))
    return _groups(_grouped(weight, layout), s, z, scale, layout, grid.in_features)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises UserError naming the tensor and its first NaN or inf."""
    finite = torch.isfinite(weight)
    if not finite.all():
        index = tuple(int(i) for i in (~finite).nonzero()[0])
        count = int((~finite).sum())
        raise UserError(
            f"{name}: {count} of {weight.numel()} values are NaN or infinite, the first "
            f"({weight[index].item()}) at {list(index)}; the checkpoint is damaged"
        )


def _search_channels(block: Tensor, layout: WeightLayout) -> PackedWeight:
    """Searches clipped scales per row, then fits the scale by least squares."""
    top = layout.largest
    full = _usable(block.abs().amax(1) / top)
    best, best_error = full, torch.full_like(full, float("inf"))
    for clip in CHANNEL_CLIPS:
        scale = _usable(full * clip)
        q = (block / scale[:, None]).round_().clamp_(-top, top)
        error = (q * scale[:, None] - block).square_().sum(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    for _ in range(REFITS):
        q = (block / best[:, None]).round_().clamp_(-top, top)
        best = _least_squares(block, q, best)
    return _channels(block, best, layout)


def _search_groups(block: Tensor, layout: WeightLayout) -> PackedWeight:
    """Minimises the error per row over (channel scale, s, z), then fits the scale.

    First the best real step of each group is found. Then, for each candidate of the channel scale,
    the two integers s around that step are tried, with three windows of codes each, and the row
    keeps the candidate with the least total error. Takes 0.8 CPU s for a (4096, 1024) weight in 4
    bits (AVX-512 EPYC); within 3 % of the error of unrestricted real group steps.
    """
    grouped = _grouped(block, layout)
    wanted = _best_step(grouped, layout)
    scale, s, z = _best_scale(grouped, wanted, layout)
    flat = grouped.flatten(1)
    for _ in range(REFITS):
        codes = _round(grouped, s, z, scale, layout)
        scale = _least_squares(flat, ((codes - z[..., None]) * s[..., None]).flatten(1), scale)
    return _groups(grouped, s, z, scale, layout, block.shape[1])


def _as_matrix(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: expected a float matrix, found {weight.dtype} {weight.shape}")
    check_finite(weight, name)
    return weight.detach().to("cpu", torch.float32)


def _by_rows(w: Tensor, search: Callable[[Tensor], PackedWeight]) -> PackedWeight:
    """Runs `search` on blocks of rows in parallel, as rows are independent; joins the results."""
    rows = max(1, BLOCK_WEIGHTS // max(1, w.shape[1]))
    blocks = w.split(rows) if len(w) else (w,)
    with one_thread():
        if len(blocks) == 1:
            return search(blocks[0])
        with ThreadPoolExecutor(max_workers=min(len(blocks), CORES)) as pool:
            return _stacked(list(pool.map(search, blocks)))


def _stacked(weights: Sequence[PackedWeight]) -> PackedWeight:
    """The rows of several weights as one."""
    layout = weights[0].layout
    tensors = {name: torch.cat([w.tensors[name] for w in weights]) for name in layout.names}
    return PackedWeight(layout, tensors, weights[0].in_features)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: on blocks this small its threads mostly wait for each other
    (15 ms instead of 0.01 ms to round 10,000 values while another process uses the cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable(scale: Tensor) -> Tensor:
    """Scales, with 1 for rows of zeros (or of denormals, which need a scale below TINY)."""
    return torch.where(scale > TINY, scale, 1.0)


def _least_squares(w: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """The scale that minimises |w - scale * q|^2 for given integers, per row."""
    fitted = (w * q).sum(1) / q.square().sum(1).clamp(min=1)
    return torch.where(fitted > TINY, fitted, scale)


def _channels(w: Tensor, scale: Tensor, layout: WeightLayout) -> PackedWeight:
    """Rounds (N, K) with given channel scales."""
    q = (w / scale[:, None]).round_().clamp_(-layout.largest, layout.largest)
    padding = layout.padded(w.shape[1]) - w.shape[1]
    codes = F.pad(q.to(DTYPES[layout.dtype]), (0, padding))
    return from_codes(layout, w.shape[1], codes, scale)


def _grouped(w: Tensor, layout: WeightLayout) -> Tensor:
    """(N, K) to (N, groups, G), padded with zeros, which every window of codes contains."""
    width = layout.groups(w.shape[1]) * layout.group
    return F.pad(w, (0, width - w.shape[1])).unflatten(1, (-1, layout.group))


def _range_step(grouped: Tensor, layout: WeightLayout) -> Tensor:
    """(N, groups): the step that covers a group's range, zero included, with all codes."""
    return (grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0)) / layout.largest


def _windows(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, ...]:
    """Zero points to try for multiples low <= 0 <= high of the step; equally good if all fit."""
    left, right = (-low).clamp(0, top), (top - high).clamp(0, top)
    return left, right, ((left + right) / 2).floor()


def _group_error(grouped: Tensor, step: Tensor, reach: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Least squared error (N, groups) of multiples of `step`, and the zero point that gives it.

    Codes lie in 0..top; `reach` bounds |code - z|: 127 // s keeps the expanded weight inside int8.
    """
    multiples = (grouped / step[..., None]).round_()
    best_z = torch.zeros_like(step)
    best = torch.full_like(step, float("inf"))
    for z in _windows(multiples.amin(2).clamp(max=0), multiples.amax(2).clamp(min=0), top):
        low, high = torch.maximum(-z, -reach), torch.minimum(top - z, reach)
        inside = torch.minimum(torch.maximum(multiples, low[..., None]), high[..., None])
        error = inside.mul_(step[..., None]).sub_(grouped).square_().sum(2)
        best_z = torch.where(error < best, z, best_z)
        best = torch.minimum(error, best)
    return best, best_z


def _best_step(grouped: Tensor, layout: WeightLayout) -> Tensor:
    """(N, groups): the real step with the least error, as if every step could be stored."""
    full = _usable(_range_step(grouped, layout))
    best, best_error = full, torch.full_like(full, float("inf"))
    free = torch.full_like(full, float(layout.largest))
    for clip in CLIPS:
        error, _ = _group_error(grouped, full * clip, free, layout.largest)
        best = torch.where(error < best_error, full * clip, best)
        best_error = torch.minimum(error, best_error)
    return torch.where(grouped.abs().amax(2) > 0, best, 0.0)


def _best_scale(
    grouped: Tensor, wanted: Tensor, layout: WeightLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel scale (N,) and the groups' integers s, z (N, groups) with the row's least error."""
    unit = _usable(wanted.amax(1) / 16)
    best_total = torch.full_like(unit, float("inf"))
    scale, s, z = unit, torch.ones_like(wanted), torch.zeros_like(wanted)
    # Rows of one sign use codes up to 127 / s on one side only: the largest weight decides.
    peak = grouped.abs().amax((1, 2)) / INT8_MAX
    candidates = [unit * factor for factor in SCALES] + [peak * factor for factor in PEAKS]
    for candidate in map(_usable, candidates):
        ratio = wanted / candidate[:, None]
        down, up = ratio.floor().clamp_(1, 16), ratio.ceil().clamp_(1, 16)
        (down_error, down_z), (up_error, up_z) = (
            _group_error(grouped, s_ * candidate[:, None], (INT8_MAX / s_).floor(), layout.largest)
            for s_ in (down, up)
        )
        go_up = up_error < down_error
        total = torch.where(go_up, up_error, down_error).sum(1)
        better = total < best_total
        scale = torch.where(better, candidate, scale)
        s = torch.where(better[:, None], torch.where(go_up, up, down), s)
        z = torch.where(better[:, None], torch.where(go_up, up_z, down_z), z)
        best_total = torch.minimum(total, best_total)
    return scale, s, z


def _round(grouped: Tensor, s: Tensor, z: Tensor, scale: Tensor, layout: WeightLayout) -> Tensor:
    """Codes (N, groups, G) as floats, nearest to the weights, inside +-127 when expanded."""
    reach, top = (INT8_MAX / s).floor(), layout.largest
    low, high = torch.maximum(-z, -reach)[..., None], torch.minimum(top - z, reach)[..., None]
    multiples = (grouped / (s * scale[:, None])[..., None]).round_()
    return torch.minimum(torch.maximum(multiples, low), high) + z[..., None]


def _groups(
    grouped: Tensor, s: Tensor, z: Tensor, scale: Tensor, layout: WeightLayout, in_features: int
) -> PackedWeight:
    """Rounds (N, groups, G) with given scales and zero points."""
    codes = _round(grouped, s, z, scale, layout).flatten(1)[:, : layout.padded(in_features)]
    dtype = DTYPES[layout.dtype]
    return from_codes(layout, in_features, codes.to(dtype), scale, pack_group(s, z))
