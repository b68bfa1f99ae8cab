"""The packed linears in plain PyTorch: what every fast kernel is tested against.

One int8 world: a 4-bit weight expands EXACTLY to int8, w8 = s * (q - z) with small integers s and z
per group, and one float scale per output channel is applied at the very end (QServe's idea). So an
int8 GEMM serves both widths, and the integer part of every path here is exact, bit for bit.

Layouts (docs/format.md): int8 is (N, K), K contiguous. int4 is uint8 (N, Kp/2) with Kp = K rounded
up to a multiple of 64; within each K block of 64, byte j holds input j in its low nibble and input
j + 32 in its high nibble. `group` is uint8 (N, ceil(Kp / G)): high nibble s - 1, low nibble z.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

KBLOCK = 64  # inputs that are interleaved in 32 bytes of an int4 row
INT8_MAX = 127  # symmetric: -128 is never used, so that negation is safe in every kernel
# int32 accumulators hold 127^2 * K; the largest K of any published DiT linear is 6400.
MAX_K = (2**31 - 1) // INT8_MAX**2
# Partial sums of up to 1040 products of at most 127^2 stay below 2^24, hence exact in float32.
EXACT_K = 1024


def padded_k(k: int) -> int:
    """K rounded up to a whole number of int4 blocks."""
    return -(-k // KBLOCK) * KBLOCK


def group_count(k: int, group_size: int) -> int:
    """Groups of an int4 row of true length k; the last may be cut short by the padding's end."""
    return -(-padded_k(k) // group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0..15 as uint8 (N, Kp), Kp a multiple of 64, to bytes (N, Kp/2)."""
    if codes.dtype != torch.uint8 or codes.ndim != 2 or codes.shape[1] % KBLOCK:
        raise ValueError(
            f"int4 codes must be uint8 (N, multiple of {KBLOCK}), "
            f"found {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"int4 codes must lie in 0..15, found {int(codes.max())}")
    low, high = codes.unflatten(1, (-1, 2, KBLOCK // 2)).unbind(2)
    return (low | (high << 4)).flatten(1)


def unpack_int4(packed: Tensor) -> Tensor:
    """Bytes (N, Kp/2) to codes 0..15, uint8 (N, Kp). The inverse of `pack_int4`."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % (KBLOCK // 2):
        raise ValueError(
            f"packed int4 must be uint8 (N, multiple of {KBLOCK // 2}), "
            f"found {packed.dtype} {tuple(packed.shape)}"
        )
    halves = packed.unflatten(1, (-1, KBLOCK // 2))
    return torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)


def pack_group(s: Tensor, z: Tensor) -> Tensor:
    """Integer group scales s in 1..16 and zero points z in 0..15 to one byte each."""
    return ((s - 1).to(torch.uint8) << 4) | z.to(torch.uint8)


def expand_int4(q4: Tensor, group: Tensor, group_size: int, in_features: int) -> Tensor:
    """Packed int4 to the exact int8 weight (N, in_features): s * (q - z).

    Raises ValueError where the sizes disagree. Values beyond +-127, which a quantizer never writes,
    wrap as in every other kernel; `check_int4` finds them.
    """
    rows, expected = q4.shape[0], group_count(in_features, group_size)
    if q4.shape[1] * 2 != padded_k(in_features) or group.shape != (rows, expected):
        raise ValueError(
            f"int4 weight {tuple(q4.shape)} with groups {tuple(group.shape)}: expected "
            f"({rows}, {padded_k(in_features) // 2}) and ({rows}, {expected}) "
            f"for {in_features} inputs in groups of {group_size}"
        )
    s = ((group >> 4) + 1).to(torch.int8)
    z = (group & 15).to(torch.int8)
    codes = unpack_int4(q4).to(torch.int8)
    width = codes.shape[1]
    s = s.repeat_interleave(group_size, 1)[:, :width]
    z = z.repeat_interleave(group_size, 1)[:, :width]
    return ((codes - z) * s)[:, :in_features].contiguous()


def check_int4(q4: Tensor, group: Tensor, group_size: int, in_features: int) -> None:
    """Raises ValueError unless every weight expands into [-127, 127] and the padding to 0."""
    codes = unpack_int4(q4).to(torch.int16)
    s = ((group >> 4) + 1).to(torch.int16).repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    z = (group & 15).to(torch.int16).repeat_interleave(group_size, 1)[:, : codes.shape[1]]
    wide = (codes - z) * s
    if wide.numel() and int(wide.abs().max()) > INT8_MAX:
        raise ValueError(f"an int4 weight expands to {int(wide.abs().max())}, beyond 127")
    if wide[:, in_features:].any():
        raise ValueError("the padding of an int4 weight does not expand to 0")


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic per-token int8: x (..., K) to xq int8 (..., K) and sx float32 (..., 1).

    sx = absmax / 127 and xq = round-half-even(x / sx), in float32 whatever x is. A token of zeros
    gets sx = 0. A token with NaN or inf gets sx = NaN and xq = 0, so the output is NaN as well.
    """
    wide = x.float()
    peak = wide.abs().amax(-1, keepdim=True)
    sx = peak / INT8_MAX
    # Multiplying by 127 / peak would overflow for denormal peaks: 127 / 1e-38 is inf.
    scaled = wide / torch.where(sx > 0, sx, 1.0)
    broken = ~torch.isfinite(peak)
    sx = torch.where(broken, float("nan"), sx)
    scaled = torch.where(broken, 0.0, scaled)
    return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), sx


@functools.cache
def _exact_int_mm() -> bool:
    """Whether torch._int_mm is exact here: without VNNI, oneDNN's 16-bit pair sums can saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def int8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) int8 times w (N, K) int8 transposed, exactly: int32 (M, N).

    float32 in slices of 1024 inputs is exact on every device (also with TF32: int8 values need 8
    bits of its 11). torch._int_mm takes 0.4x of that time, used on CPUs with VNNI only.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"inner sizes differ: {tuple(x.shape)} and {tuple(w.shape)}")
    if x.shape[-1] > MAX_K:
        raise ValueError(f"K = {x.shape[-1]} could overflow int32 accumulators: at most {MAX_K}")
    if x.device.type == "cpu" and _exact_int_mm() and x.numel() and w.numel():
        return torch._int_mm(x.contiguous(), w.t())
    out = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[-1], EXACT_K):
        part = slice(start, start + EXACT_K)
        out += (x[:, part].float() @ w[:, part].float().t()).to(torch.int32)
    return out


def linear_a16_ref(x: Tensor, w8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Weight-only: x (..., K) in its own dtype times the dequantized w8 (N, K) * scale (N,)."""
    weight = (w8.float() * scale[:, None]).to(x.dtype)
    return F.linear(x, weight, bias)


def linear_w8a8_ref(x: Tensor, w8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """int8 x int8: the exact integer product, then sx[token] * scale[channel] and bias in float32.

    x (..., K) float, w8 (N, K) int8, scale (N,) float32; returns (..., N) in x's dtype.
    """
    xq, sx = quantize_activations(x.reshape(-1, x.shape[-1]))
    out = int8_matmul(xq, w8).float() * sx * scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def gemm_ref(
    x: Tensor,
    sx: Tensor | None,
    w8: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gelu_from: int,
    residual: Tensor | None,
    gate: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """A packed linear with its epilogue, float32 after the product: (M, N) in `dtype`.

    x (M, K) float, or int8 codes with sx (M, 1) or (M,). Then * scale, + bias (N,), GELU (tanh) in
    columns from gelu_from on (-1: none), and residual (M, N) + gate (1 or M / tokens, N) * y.
    """
    if sx is None:
        out = x.float() @ (w8.float() * scale[:, None]).t()
    else:
        out = int8_matmul(x, w8).float() * sx.reshape(-1, 1) * scale
    if bias is not None:
        out = out + bias.float()
    if gelu_from >= 0:
        out = torch.cat([out[:, :gelu_from], F.gelu(out[:, gelu_from:], approximate="tanh")], dim=1)
    if residual is not None and gate is not None:
        rows = torch.arange(x.shape[0], device=x.device) // tokens
        spread = gate if gate.shape[0] == 1 else gate[rows]
        out = residual.float() + spread.float() * out
    return out.to(dtype)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN in float32: (1 + scale) * LayerNorm(x) + shift; x (B, n, h), modulation (B, 1, h)."""
    norm = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (1 + scale.float()) * norm + shift.float()


def join_ref(left: Tensor | None, right: Tensor, gelu: bool) -> Tensor:
    """[left | GELU(right)] in float32, GELU in its tanh form and only if asked for."""
    wide = F.gelu(right.float(), approximate="tanh") if gelu else right.float()
    return wide if left is None else torch.cat([left.float(), wide], dim=-1)


def qk_norm_ref(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """RMS-normalised q and k (B, H, n, d) of qkv (B, n, 3 * H * d), float32 inside."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).float()
    parts = [
        y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * scale.float()
        for y, scale in ((q, q_scale), (k, k_scale))
    ]
    return parts[0].to(qkv.dtype).contiguous(), parts[1].to(qkv.dtype).contiguous()
