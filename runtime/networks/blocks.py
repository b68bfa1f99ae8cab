"""Parts that the networks share: norms, attention, MLP, and removing blocks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.layermap import BLOCK_FIELDS, kept_blocks

Network = TypeVar("Network", bound=nn.Module)


class BlockSizes:
    """What all networks' hyper-parameters say of their blocks."""

    network_kind: ClassVar[str]
    hidden: int
    heads: int
    mlp_ratio: float

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if not 0 < self.mlp_ratio <= 64:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; expected above 0, at most 64")
        for kind, kept in kept_blocks(self).items():
            if list(kept) != sorted(set(kept)) or any(index < 0 for index in kept):
                raise ValueError(
                    f"{BLOCK_FIELDS[kind]} {kept} must be ascending distinct original indices"
                )

    def to_json(self) -> dict[str, Any]:
        """The hyper-parameters as the packed header states them."""
        lists = {BLOCK_FIELDS[kind]: list(indices) for kind, indices in kept_blocks(self).items()}
        return {"kind": self.network_kind, **asdict(self), **lists}  # type: ignore[call-overload]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden * self.mlp_ratio)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (B, H, n, d), returned as (B, n, H*d); `bias` (1, n)
    of the keys."""
    if torch.is_grad_enabled() and q.device.type == "cpu" and q.requires_grad:
        # torch's CPU flash attention has a slow backward at ~100 tokens: 0.273 s a training step
        # with it, 0.154 s with the explicit form (furniture model, 2 cores).
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, bias)
    return out.transpose(1, 2).flatten(2)


def multiplicity(repeats: int, tokens: int, latents: int, like: Tensor) -> Tensor | None:
    """Bias (1, tokens + latents) with which each of the first keys stands for `repeats` equal ones:
    n equal terms of a softmax are one whose exponent is log n larger. None where that is 0."""
    if repeats == 1:
        return None
    bias = like.new_zeros(1, tokens + latents)
    bias[:, :tokens].fill_(math.log(repeats))
    return bias


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: (1 + scale) * LayerNorm(x) + shift, with (B or 1, 1, h) modulation."""
    return (1 + scale) * layer_norm(x) + shift


def clipped(x: Tensor, clips: bool) -> Tensor:
    """A token stream after a block's addition; `clips`: see `DiTConfig`."""
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


def mlp(config: BlockSizes) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden, config.mlp_hidden),
        nn.GELU(approximate="tanh"),
        nn.Linear(config.mlp_hidden, config.hidden),
    )


def leave_out(network: Network, blocks: Iterable[tuple[str, int]]) -> Network:
    """A copy that shares all weights but has no such blocks: (kind, original index)."""
    gone, pruned = set(blocks), copy.copy(network)
    pruned._modules = dict(network._modules)
    changes: dict[str, Any] = {}
    for kind, indices in kept_blocks(network.config).items():
        kept = tuple(index for index in indices if (kind, index) not in gone)
        ours = getattr(network, BLOCK_FIELDS[kind])
        pruned._modules[BLOCK_FIELDS[kind]] = nn.ModuleDict({str(i): ours[str(i)] for i in kept})
        changes[BLOCK_FIELDS[kind]] = kept
    pruned.config = replace(network.config, **changes)  # type: ignore[type-var]
    return pruned
