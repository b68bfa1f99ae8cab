"""Fused row kernels around the GEMMs: adaLN, GELU, quantization, gate and residual, q/k norm.

Each reads its input once and keeps a row in registers in float32, which saves memory traffic, the
whole cost of elementwise operations. With `quantize` a kernel emits int8 and one float32 scale per
row, exactly as `reference.quantize_activations` does, for the int8 GEMM that follows. Only plain
Triton operations are used, so the interpreter runs the shipped kernels.

Compiled, not timed: none of this has run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1.5 * 2^23: adding and subtracting it rounds a float32 of at most 2^22, ties to even.
ROUND = tl.constexpr(12582912.0)
# Triton 3.9 warns if this is not set, and 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def gelu(x):
    """GELU, tanh form, of float32: x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _store_row(y, out, sx, row, offsets, inside, QUANTIZE: tl.constexpr):
    """Stores a float32 row, or its int8 codes and scale. NaN or inf: scale NaN, codes 0."""
    if QUANTIZE:
        size = tl.where(inside, tl.abs(y), 0.0)
        # tl.max ignores NaN, so NaN is tested separately.
        broken = tl.max((~(size < float("inf"))).to(tl.int32), axis=0) > 0
        peak = tl.max(size, axis=0)
        step = tl.div_rn(peak, 127.0)
        scaled = tl.div_rn(y, tl.where(step > 0, step, 1.0) + tl.zeros_like(y))
        scaled = tl.where(broken, 0.0, scaled)
        codes = tl.clamp((scaled + ROUND) - ROUND, -127.0, 127.0)
        tl.store(out + offsets, codes.to(tl.int8), mask=inside)
        tl.store(sx + row, tl.where(broken, float("nan"), step))
    else:
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def modulate_kernel(
    x, shift, scale, out, sx, width, tokens, stride_x, stride_shift, stride_scale,
    QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """adaLN of one token: (1 + scale) * LayerNorm(x) + shift, eps 1e-6."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    batch = row // tokens
    wide = tl.load(x + row * stride_x + offsets, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(wide, axis=0) / width
    centred = tl.where(inside, wide - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    a = tl.load(scale + batch * stride_scale + offsets, mask=inside, other=0).to(tl.float32)
    b = tl.load(shift + batch * stride_shift + offsets, mask=inside, other=0).to(tl.float32)
    y = (1 + a) * (centred * tl.rsqrt(variance + 1e-6)) + b
    _store_row(y, out + row * width, sx, row, offsets, inside, QUANTIZE)


@triton.jit
def join_kernel(
    left, right, out, sx, width_left, width, stride_left, stride_right,
    LEFT: tl.constexpr, GELU: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's row [left | right], left and GELU of right optional: a linear's input."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    in_right = inside & (offsets >= width_left)
    r = right + row * stride_right + offsets - width_left
    y = tl.load(r, mask=in_right, other=0).to(tl.float32)
    if GELU:
        y = gelu(y)
    if LEFT:
        in_left = offsets < width_left
        y += tl.load(left + row * stride_left + offsets, mask=in_left, other=0).to(tl.float32)
    _store_row(y, out + row * width, sx, row, offsets, inside, QUANTIZE)


@triton.jit(do_not_specialize=["tokens"])
def gate_residual_kernel(
    x, gate, y, out, width, tokens, stride_x, stride_gate, stride_y, BLOCK: tl.constexpr
):
    """out = x + gate * y for one token."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < width
    g = tl.load(gate + row // tokens * stride_gate + offsets, mask=inside, other=0).to(tl.float32)
    wide = tl.load(y + row * stride_y + offsets, mask=inside, other=0).to(tl.float32)
    before = tl.load(x + row * stride_x + offsets, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * width + offsets, (before + g * wide).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_kernel(
    qkv, q_scale, k_scale, q, k, tokens, heads, dim, stride_qkv,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """RMS norm of one token's queries and keys, from (B, n, 3, H, d) to (B, H, n, d)."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DIM)[None, :]
    inside = (h < heads) & (d < dim)
    source = qkv + row * stride_qkv + h * dim + d
    target = ((row // tokens * heads + h) * tokens + row % tokens) * dim + d
    for part in tl.static_range(2):
        wide = tl.load(source + part * heads * dim, mask=inside, other=0).to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + 1e-6)[:, None]
        if part == 0:
            wide *= tl.load(q_scale + d, mask=d < dim, other=0).to(tl.float32)
            tl.store(q + target, wide.to(q.dtype.element_ty), mask=inside)
        else:
            wide *= tl.load(k_scale + d, mask=d < dim, other=0).to(tl.float32)
            tl.store(k + target, wide.to(k.dtype.element_ty), mask=inside)


def row_shape(width: int) -> tuple[int, int]:
    """(BLOCK, warps) of a row kernel: at most 16 values per thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


def _rows(x: Tensor) -> Tensor:
    """(..., K) as (M, K) with contiguous rows; a view if the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _modulation(x: Tensor, m: Tensor) -> tuple[Tensor, int]:
    """Modulation (B or 1, 1, h) of x (B, n, h) with contiguous rows, and its batch stride."""
    if m.shape[-1] != x.shape[-1] or m.shape[-2] != 1 or m.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"modulation {tuple(m.shape)} does not fit tokens {tuple(x.shape)}")
    m = m if m.stride(-1) == 1 else m.contiguous()
    return m, 0 if m.shape[0] == 1 else m.stride(0)


def _outputs(x: Tensor, shape: tuple[int, ...], quantize: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if quantize else x.dtype
    out = torch.empty(shape, dtype=dtype, device=x.device)
    sx_shape = (*shape[:-1], 1) if quantize else (0,)
    return out, torch.empty(sx_shape, dtype=torch.float32, device=x.device)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
    """adaLN of x (B, n, h) with (B or 1, 1, h) modulation: (y, empty), or int8 codes and scales."""
    (shift, step_shift), (scale, step_scale) = _modulation(x, shift), _modulation(x, scale)
    flat = _rows(x)
    out, sx = _outputs(x, x.shape, quantize)
    block, warps = row_shape(x.shape[-1])
    if flat.numel():
        modulate_kernel[(flat.shape[0],)](
            flat, shift, scale, out, sx, x.shape[-1], x.shape[-2], flat.stride(0),
            step_shift, step_scale, QUANTIZE=quantize, BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out, sx


def join(left: Tensor | None, right: Tensor, gelu: bool, quantize: bool) -> tuple[Tensor, Tensor]:
    """[left | GELU(right)] of (..., K1) and (..., K2), as (y, empty) or as int8 codes and scales.

    With left=None and gelu=False it only quantizes the activations.
    """
    flat = _rows(right)
    first = flat if left is None else _rows(left)
    width_left = 0 if left is None else left.shape[-1]
    width = width_left + right.shape[-1]
    out, sx = _outputs(right, (*right.shape[:-1], width), quantize)
    block, warps = row_shape(width)
    if out.numel():
        join_kernel[(flat.shape[0],)](
            first, flat, out, sx, width_left, width, first.stride(0), flat.stride(0),
            LEFT=left is not None, GELU=gelu, QUANTIZE=quantize, BLOCK=block,
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out, sx


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y for tokens (B, n, h) and a gate (B or 1, 1, h)."""
    gate, step = _modulation(x, gate)
    before, after = _rows(x), _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = row_shape(x.shape[-1])
    if out.numel():
        gate_residual_kernel[(before.shape[0],)](
            before, gate, after, out, x.shape[-1], x.shape[-2], before.stride(0), step,
            after.stride(0), BLOCK=block, num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return out


def qk_norm(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Normalised q and k (B, H, n, d) from qkv (B, n, 3 * H * d), its last dimension contiguous."""
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    flat = _rows(qkv)
    q = torch.empty(batch, heads, tokens, dim, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty_like(q)
    if q.numel():
        padded = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
        qk_norm_kernel[(flat.shape[0],)](
            flat, q_scale, k_scale, q, k, tokens, heads, dim, flat.stride(0),
            HEADS=padded[0], DIM=padded[1],
            num_warps=row_shape(padded[0] * padded[1])[1], **OPTIONS,
        )  # fmt: skip
    return q, k
