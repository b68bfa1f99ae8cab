"""Float weights to int8 and int4 in the packed layout (docs/format.md): quantizers by name.

    weight = QUANTIZERS["search"].int4(w, group_size=32)   # Int4Weight(q4, group, scale)

int8 is symmetric per output channel. int4 has per group of G inputs a small integer scale s and a
zero point z under one float scale per output channel: w = scale[n] * s * (q - z). The lattice of a
group is thus the multiples of scale * s, and z only says which 16 of them can be reached.
"rtn" rounds to the nearest code after covering each group's range. "search" minimises the squared
error of each row over the channel scale, s and z, then fits the channel scale by least squares.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear.reference import (
    INT8_MAX,
    expand_int4,
    group_count,
    pack_group,
    pack_int4,
    padded_k,
)
from vitapack.runtime.errors import UserError

# Rows are searched in blocks of about this many weights, so that a block stays in the L2 cache.
BLOCK_WEIGHTS = 1 << 17
# Step of a group relative to covering its range exactly. N(0, 1) in groups of 32 / 128 is best
# near 0.92 / 0.8; below 0.6 never won, over 1 is no clipping and rounds better by chance.
CLIPS = (0.62, 0.7, 0.76, 0.82, 0.87, 0.91, 0.95, 1.0, 1.06)
# Channel scale relative to giving the widest group s = 16: the others give it s = 15 ... 7. It
# needs s = 8 if its weights have one sign (15 codes times 8 is 120) and 15 or less to reach all 16
# codes inside +-127 otherwise; below 1 it is clipped.
SCALES = (0.6, 0.75, 0.88, 1.0, *(16 / s for s in range(15, 6, -1)))
PEAKS = (0.9, 0.95, 1.0)  # channel scale relative to absmax / 127
INT8_CLIPS = (1.0, 0.96, 0.91, 0.86, 0.8, 0.7, 0.6)
REFITS = 2  # rounds of least-squares scale + rounding; a third gains < 0.1 % of the error
TINY = torch.finfo(torch.float32).tiny
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Part = TypeVar("Part")


@dataclass(frozen=True)
class Int8Weight:
    """w = scale[n] * q8[n, k]; q8 int8 (N, K) in +-127, scale float32 (N,) > 0."""

    q8: Tensor
    scale: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By the suffix that each has after `X.weight.` in the packed file."""
        return {"q8": self.q8, "scale": self.scale}

    def dequantized(self) -> Tensor:
        return self.q8.float() * self.scale[:, None]

    def rounded(self, weight: Tensor) -> Int8Weight:
        """Another weight (N, K) float32 in the same scales."""
        return _int8(weight, self.scale)


@dataclass(frozen=True)
class Int4Weight:
    """w = scale[n] * s * (q - z); q4 uint8 (N, Kp/2), group uint8 (N, ceil(Kp/G)), scale (N,)."""

    q4: Tensor
    group: Tensor
    scale: Tensor
    in_features: int
    group_size: int

    def tensors(self) -> dict[str, Tensor]:
        return {"q4": self.q4, "group": self.group, "scale": self.scale}

    def dequantized(self) -> Tensor:
        w8 = expand_int4(self.q4, self.group, self.group_size, self.in_features)
        return w8.float() * self.scale[:, None]

    def rounded(self, weight: Tensor) -> Int4Weight:
        """Another weight (N, K) float32 in the same scales and zero points."""
        s, z = (self.group >> 4).float() + 1, (self.group & 15).float()
        grouped = _grouped(weight, self.group_size)
        return _int4(grouped, s, z, self.scale, self.in_features, self.group_size)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises UserError naming the tensor and its first NaN or inf."""
    finite = torch.isfinite(weight)
    if not finite.all():
        where = tuple(int(i) for i in (~finite).nonzero()[0])
        count = int((~finite).sum())
        raise UserError(
            f"{name}: {count} of {weight.numel()} values are NaN or infinite, the first "
            f"({weight[where].item()}) at {list(where)}; the checkpoint is damaged"
        )


def rtn_int8(weight: Tensor, name: str = "weight") -> Int8Weight:
    """Round to nearest with scale = absmax / 127 per row; (N, K) of any float dtype."""
    w = _as_matrix(weight, name)
    return _int8(w, _usable(w.abs().amax(1) / INT8_MAX))


def search_int8(weight: Tensor, name: str = "weight") -> Int8Weight:
    """Least squared error over clipped scales per row, then a least-squares fit of the scale."""
    w = _as_matrix(weight, name)

    def search(block: Tensor) -> Int8Weight:
        full = _usable(block.abs().amax(1) / INT8_MAX)
        best, best_error = full, torch.full_like(full, float("inf"))
        for clip in INT8_CLIPS:
            scale = _usable(full * clip)
            q = (block / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
            error = (q * scale[:, None] - block).square_().sum(1)
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
        for _ in range(REFITS):
            q = (block / best[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
            best = _least_squares(block, q, best)
        return _int8(block, best)

    parts = _by_rows(w, search)
    return Int8Weight(torch.cat([p.q8 for p in parts]), torch.cat([p.scale for p in parts]))


def rtn_int4(weight: Tensor, group_size: int, name: str = "weight") -> Int4Weight:
    """Covers each group's range with 16 codes: the channel scale is 1/16 of the widest step."""
    w = _as_matrix(weight, name)
    grouped = _grouped(w, group_size)  # (N, groups, G)
    step = _range_step(grouped)
    # s * 7 must reach the row's largest weight inside +-127.
    scale = _usable(torch.maximum(step.amax(1) / 16, w.abs().amax(1) / INT8_MAX))
    s = (step / scale[:, None]).round_().clamp_(1, 16)
    z = (-grouped.amin(2).clamp(max=0) / (s * scale[:, None])).round_().clamp_(0, 15)
    return _int4(grouped, s, z, scale, w.shape[1], group_size)


def search_int4(weight: Tensor, group_size: int, name: str = "weight") -> Int4Weight:
    """Least squared error per row over (channel scale, s, z), then least squares for the scale.

    First every group finds the step it would like best; then for each candidate of the channel
    scale the two integers s around that step are tried, with three windows of codes each, and the
    row keeps the candidate with the least total error. 0.8 CPU s for a (4096, 1024) weight (AVX-512
    EPYC); within 3 % of the error that free real group steps would give.
    """
    w = _as_matrix(weight, name)

    def search(block: Tensor) -> Int4Weight:
        grouped = _grouped(block, group_size)
        wanted = _best_step(grouped)
        scale, s, z = _best_scale(grouped, wanted)
        flat = grouped.flatten(1)
        for _ in range(REFITS):
            codes = _round(grouped, s, z, scale)
            scale = _least_squares(flat, ((codes - z[..., None]) * s[..., None]).flatten(1), scale)
        return _int4(grouped, s, z, scale, w.shape[1], group_size)

    parts = _by_rows(w, search)
    return Int4Weight(
        torch.cat([part.q4 for part in parts]),
        torch.cat([part.group for part in parts]),
        torch.cat([part.scale for part in parts]),
        w.shape[1],
        group_size,
    )


@dataclass(frozen=True)
class Quantizer:
    """One way from float weights to both packed widths."""

    int8: Callable[..., Int8Weight]  # (weight, name=...)
    int4: Callable[..., Int4Weight]  # (weight, group_size, name=...)


QUANTIZERS = {
    "rtn": Quantizer(rtn_int8, rtn_int4),
    "search": Quantizer(search_int8, search_int4),
}


def _as_matrix(weight: Tensor, name: str) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: expected a float matrix, found {weight.dtype} {weight.shape}")
    check_finite(weight, name)
    return weight.detach().to("cpu", torch.float32)


def _by_rows(w: Tensor, search: Callable[[Tensor], Part]) -> list[Part]:
    """`search` on blocks of rows, in order; rows are independent, so blocks run side by side."""
    rows = max(1, BLOCK_WEIGHTS // max(1, w.shape[1]))
    blocks = w.split(rows) if len(w) else (w,)
    with one_thread_each():
        if len(blocks) == 1:
            return [search(blocks[0])]
        with ThreadPoolExecutor(max_workers=min(len(blocks), CORES)) as pool:
            return list(pool.map(search, blocks))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's own threads off: on blocks of this size they wait for each other more than they work
    (15 ms instead of 0.01 ms for one rounding of 10,000 values while another job has the cores).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _usable(scale: Tensor) -> Tensor:
    """Rows of zeros (or of denormals, which no scale can hold) get scale 1 and codes 0."""
    return torch.where(scale > TINY, scale, 1.0)


def _least_squares(w: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """The scale that minimises |w - scale * q|^2 for given integers, per row."""
    fitted = (w * q).sum(1) / q.square().sum(1).clamp(min=1)
    return torch.where(fitted > TINY, fitted, scale)


def _int8(w: Tensor, scale: Tensor) -> Int8Weight:
    q = (w / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return Int8Weight(q.to(torch.int8), scale)


def _grouped(w: Tensor, group_size: int) -> Tensor:
    """(N, K) to (N, groups, G), padded with zeros, which every window of codes can express."""
    width = group_count(w.shape[1], group_size) * group_size
    return F.pad(w, (0, width - w.shape[1])).unflatten(1, (-1, group_size))


def _range_step(grouped: Tensor) -> Tensor:
    """(N, groups): the step that covers a group's range, zero included, with 16 codes."""
    return (grouped.amax(2).clamp(min=0) - grouped.amin(2).clamp(max=0)) / 15


def _windows(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Zero points to try for multiples low <= 0 <= high of the step: all the same if they fit."""
    left, right = (-low).clamp(0, 15), (15 - high).clamp(0, 15)
    return left, right, ((left + right) / 2).floor()


def _group_error(grouped: Tensor, step: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Least squared error (N, groups) of multiples of `step`, and the zero point that reaches it.

    `reach` bounds |q - z|: 127 // s keeps the expanded weight inside int8.
    """
    multiples = (grouped / step[..., None]).round_()
    best_z = torch.zeros_like(step)
    best = torch.full_like(step, float("inf"))
    for z in _windows(multiples.amin(2).clamp(max=0), multiples.amax(2).clamp(min=0)):
        low, high = torch.maximum(-z, -reach), torch.minimum(15 - z, reach)
        inside = torch.minimum(torch.maximum(multiples, low[..., None]), high[..., None])
        error = inside.mul_(step[..., None]).sub_(grouped).square_().sum(2)
        best_z = torch.where(error < best, z, best_z)
        best = torch.minimum(error, best)
    return best, best_z


def _best_step(grouped: Tensor) -> Tensor:
    """(N, groups): the step with the least error if any real number could be had."""
    full = _usable(_range_step(grouped))
    best, best_error = full, torch.full_like(full, float("inf"))
    free = torch.full_like(full, 15.0)
    for clip in CLIPS:
        error, _ = _group_error(grouped, full * clip, free)
        best = torch.where(error < best_error, full * clip, best)
        best_error = torch.minimum(error, best_error)
    return torch.where(grouped.abs().amax(2) > 0, best, 0.0)


def _best_scale(grouped: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Channel scale (N,) and the groups' integers s, z (N, groups) with the row's least error."""
    unit = _usable(wanted.amax(1) / 16)
    best_total = torch.full_like(unit, float("inf"))
    scale, s, z = unit, torch.ones_like(wanted), torch.zeros_like(wanted)
    # Rows of one sign use codes up to 127 / s on one side only: the largest weight decides there.
    peak = grouped.abs().amax((1, 2)) / INT8_MAX
    candidates = [unit * factor for factor in SCALES] + [peak * factor for factor in PEAKS]
    for candidate in map(_usable, candidates):
        ratio = wanted / candidate[:, None]
        down, up = ratio.floor().clamp_(1, 16), ratio.ceil().clamp_(1, 16)
        down_error, down_z = _group_error(
            grouped, down * candidate[:, None], (INT8_MAX / down).floor()
        )
        up_error, up_z = _group_error(grouped, up * candidate[:, None], (INT8_MAX / up).floor())
        go_up = up_error < down_error
        total = torch.where(go_up, up_error, down_error).sum(1)
        better = total < best_total
        scale = torch.where(better, candidate, scale)
        s = torch.where(better[:, None], torch.where(go_up, up, down), s)
        z = torch.where(better[:, None], torch.where(go_up, up_z, down_z), z)
        best_total = torch.minimum(total, best_total)
    return scale, s, z


def _round(grouped: Tensor, s: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """Codes (N, groups, G) as floats 0..15, nearest to the weights, inside +-127 when expanded."""
    reach = (INT8_MAX / s).floor()
    low, high = torch.maximum(-z, -reach)[..., None], torch.minimum(15 - z, reach)[..., None]
    multiples = (grouped / (s * scale[:, None])[..., None]).round_()
    return torch.minimum(torch.maximum(multiples, low), high) + z[..., None]


def _int4(
    grouped: Tensor, s: Tensor, z: Tensor, scale: Tensor, in_features: int, group_size: int
) -> Int4Weight:
    codes = _round(grouped, s, z, scale).flatten(1)[:, : padded_k(in_features)]
    return Int4Weight(
        pack_int4(codes.to(torch.uint8)), pack_group(s, z), scale, in_features, group_size
    )
