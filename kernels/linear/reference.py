"""The packed linears in plain PyTorch: the reference of every fast kernel.

Weights are `weights.PackedWeight`, which expand exactly to int8; all integer arithmetic here is
exact, bit for bit.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.weights import INT8_MAX, PackedWeight, dequantize, expand

# int32 accumulators hold 127^2 * K; the largest K of any published DiT linear is 6400.
MAX_K = (2**31 - 1) // INT8_MAX**2
# Partial sums of up to 1040 products of at most 127^2 stay below 2^24, hence exact in float32.
EXACT_K = 1024


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each token to int8: x (..., K) to xq int8 (..., K) and sx float32 (..., 1).

    sx = absmax / 127 and xq = round-half-even(x / sx), in float32 for any dtype of x. A token of
    zeros gets sx = 0, a token with NaN or inf gets sx = NaN and xq = 0, so its output is NaN.
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
    """Whether torch._int_mm is exact on this CPU: without VNNI, oneDNN's pair sums can saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def int8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Exact product of x (M, K) int8 with w (N, K) int8 transposed: int32 (M, N).

    float32 in slices of 1024 inputs is exact on every device (also with TF32: int8 values need 8
    bits of its 11). torch._int_mm takes 0.4x of that time and is used on CPUs with VNNI only.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"inner sizes differ: {tuple(x.shape)} and {tuple(w.shape)}")
    if x.shape[-1] > MAX_K:
        raise ValueError(f"K = {x.shape[-1]} could overflow int32 accumulators: at most {MAX_K}")
    if x.device.type == "cpu" and _exact_int_mm() and x.numel() and w.numel():
        return torch._int_mm(x.contiguous(), w.t())
    out = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[-1], EXACT_K):
        inputs = slice(start, start + EXACT_K)
        out += (x[:, inputs].float() @ w[:, inputs].float().t()).to(torch.int32)
    return out


def linear_a16_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Weight-only linear: x (..., K) times the dequantized weight (N, K), in x's dtype."""
    return F.linear(x, dequantize(weight).to(x.dtype), bias)


def linear_w8a8_ref(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """int8 linear: the exact integer product, then sx[token] * scale[channel] and bias in float32.

    x (..., K) float; returns (..., N) in x's dtype.
    """
    xq, sx = quantize_activations(x.reshape(-1, x.shape[-1]))
    out = int8_matmul(xq, expand(weight)).float() * sx * weight.scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def gemm_ref(
    x: Tensor, sx: Tensor | None, weight: PackedWeight, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """A packed linear with its epilogue in float32: (M, N) in `dtype`.

    x (M, K) float, or int8 codes with sx (M, 1) or (M,).
    """
    if sx is None:
        out = x.float() @ dequantize(weight).t()
    else:
        out = int8_matmul(x, expand(weight)).float() * sx.reshape(-1, 1) * weight.scale
    return epilogue.apply(out).to(dtype)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN in float32: (1 + scale) * LayerNorm(x) + shift; x (B, n, h), modulation (B, 1, h)."""
    norm = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (1 + scale.float()) * norm + shift.float()


def join_ref(left: Tensor | None, right: Tensor, gelu: bool) -> Tensor:
    """[left | right] in float32, with GELU (tanh form) of right if `gelu`."""
    wide = F.gelu(right.float(), approximate="tanh") if gelu else right.float()
    return wide if left is None else torch.cat([left.float(), wide], dim=-1)


def qk_norm_ref(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """RMS-normalised q and k (B, H, n, d) of qkv (B, n, 3 * H * d), computed in float32."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).float()
    parts = [
        y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * scale.float()
        for y, scale in ((q, q_scale), (k, k_scale))
    ]
    return parts[0].to(qkv.dtype).contiguous(), parts[1].to(qkv.dtype).contiguous()
