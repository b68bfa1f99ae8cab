"""Layers that the networks share: norms, attention, MLP, condition tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.architecture import Architecture


@dataclass(frozen=True)
class Condition:
    """Condition tokens (B or 1, N, D), each of which counts as `repeats` equal ones.

    Condition tokens have no positions, so equal tokens stay equal through all blocks. The
    unconditional pass, whose N tokens are all zeros, therefore equals exactly a pass on one token
    with `repeats=N` (see `vitapack.runtime.sampling.guidance`).
    """

    tokens: Tensor
    repeats: int = 1

    @classmethod
    def of(cls, cond: Tensor | Condition) -> Condition:
        return cond if isinstance(cond, Condition) else cls(cond)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: (B, H, n, d) each to (B, n, H*d), key bias (1, n)."""
    if torch.is_grad_enabled() and q.device.type == "cpu" and q.requires_grad:
        # torch's CPU flash attention has a slow backward at ~100 tokens: 0.273 s per training step
        # with it, 0.154 s with the explicit form (furniture model, 2 cores).
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    return out.transpose(1, 2).flatten(2)


def needs_gradients(x: Tensor, condition: Condition) -> bool:
    """Whether a call must be differentiable, which no fused form is."""
    return torch.is_grad_enabled() and (x.requires_grad or condition.tokens.requires_grad)


def repeated_key_bias(condition: Condition, img: Tensor) -> Tensor | None:
    """Attention bias (1, C + L) that counts each condition key `condition.repeats` times.

    img (B, L, h) gives the number of latents, dtype and device. Adding log(n) to a logit equals
    repeating its key n times. None for one repeat.
    """
    if condition.repeats == 1:
        return None
    count = condition.tokens.shape[1]
    bias = img.new_zeros(1, count + img.shape[1])
    bias[:, :count].fill_(math.log(condition.repeats))
    return bias


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without scale and bias, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (1 + scale) * LayerNorm(x) + shift, shift and scale (B or 1, 1, h)."""
    return (1 + scale) * layer_norm(x) + shift


def clipped(x: Tensor, clips: bool) -> Tensor:
    """A token stream after a block's addition; `clips`: see `DiTConfig.clips`."""
    return x.clamp(-65504.0, 65504.0) if clips and x.dtype == torch.float16 else x


class RMSNorm(nn.Module):
    """RMS normalisation over the head dimension, statistics in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def mlp(config: Architecture) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden, config.mlp_hidden),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_hidden, config.hidden),
    )
