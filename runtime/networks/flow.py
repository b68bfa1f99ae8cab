"""TRELLIS: the sparse-structure flow transformer, one kind of block, and its occupancy decoder.

A latent cube (8 channels, 16 a side) becomes 4096 tokens with their places added; 24 blocks of
modulated self-attention, plain cross-attention to the picture's tokens and a modulated MLP turn
them into a velocity. Names follow `runtime/networks/dit.py` where a part is the same (`latent_in`,
`time_in`, `mod.lin`); `runtime/families/trellis.py` maps the released ones. The structured-latent
(SLAT) flow has the same blocks between sparse convolutions: of it, the blocks alone are here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.architecture import FLOW
from vitapack.runtime.networks.blocks import BlockSizes, attention, leave_out, mlp, modulate
from vitapack.runtime.networks.modulation import Modulation, TimeEmbedding, TimeMLP, TimeNodes, When


@dataclass(frozen=True)
class FlowConfig(BlockSizes):
    """Hyper-parameters of one (possibly pruned) flow transformer."""

    network_kind: ClassVar[str] = FLOW
    guidance_embed: ClassVar[bool] = False

    resolution: int  # of the latent cube; 0 where only the blocks are there (SLAT)
    in_channels: int  # of the latent cube; 0 likewise
    patch: int  # cells a side that make one token
    cond_channels: int
    hidden: int
    heads: int
    blocks: tuple[int, ...]  # original indices of the kept blocks, ascending
    mlp_ratio: float
    time: TimeEmbedding

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % self.patch:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self.patch}")

    @property
    def token_channels(self) -> int:
        return self.in_channels * self.patch**3


def trellis_time(hidden: int) -> TimeEmbedding:
    """The time embedding of TRELLIS: t in 0..1000, [cos | sin] of 256 channels."""
    return TimeEmbedding(256, hidden, 1.0, 10_000.0, cos_first=True, activation="silu")


@functools.lru_cache(maxsize=4)
def place_embedding(
    side: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(side^3, channels): [sin | cos] of each coordinate, padded with zeros.

    What the released files hold as the buffer `pos_emb`; 16.8 MB there, so it is computed, and
    kept where it is used: no step copies it to a GPU.
    """
    count = channels // 6
    frequencies = 1.0 / 10_000.0 ** (torch.arange(count, dtype=torch.float64) / count)
    axis = torch.arange(side, dtype=torch.float64)
    cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
    angles = cells[..., None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(table, (0, channels - table.shape[1])).float().to(device, dtype)


class HeadNorm(nn.Module):
    """L2-normalisation of each head's vector, times sqrt(d) and the head's own scale."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.heads, config.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, n, d); statistics in float32."""
        unit = F.normalize(x.float(), dim=-1) * self.scale.float()[:, None]
        return (unit * x.shape[-1] ** 0.5).to(x.dtype)


class HeadNorms(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.query_norm = HeadNorm(config)
        self.key_norm = HeadNorm(config)


class SelfAttention(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.norm = HeadNorms(config)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(self.norm.query_norm(q), self.norm.key_norm(k), v))


class CrossAttention(nn.Module):
    """To the picture's tokens as they come: not normalised, not gated.

    Of a single token attention gives its value, whatever the queries are.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.hidden, config.hidden)
        self.kv = nn.Linear(config.cond_channels, 2 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        if cond.shape[1] == 1:
            return self.proj(self.kv(cond).chunk(2, dim=-1)[1])
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(cond).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v))


class FlowBlock(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.mod = Modulation(config.hidden, 6)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.cross_attn = CrossAttention(config)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, cond: Tensor, when: When) -> Tensor:
        """Tokens x (B, n, h) and the picture's tokens cond (B, C, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mod(when)
        x = x + gate1 * self.self_attn(modulate(x, shift1, scale1))
        x = x + self.cross_attn(self.cross_norm(x), cond)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class OutLayer(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.token_channels)

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class FlowTransformer(nn.Module):
    """Velocity of the latents: x (B, C, R, R, R), t (B,) or (1,) in 0..1000, cond (B, N, D).

    Without edges (SLAT) x is the blocks' own tokens (B, n, h), places included, and so is the
    output. That each token of cond stands for `repeats` equal ones changes nothing here, where
    attention to them is to nothing else.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        if config.in_channels:
            self.latent_in = nn.Linear(config.token_channels, config.hidden)
        self.time_in: nn.Module = TimeMLP(config.time, config.hidden)
        self.blocks = nn.ModuleDict({str(index): FlowBlock(config) for index in config.blocks})
        if config.in_channels:
            self.final_layer = OutLayer(config)

    def when(self, t: Tensor | When, guidance: Tensor | None = None) -> When:
        """The step's modulation input, as in `DiT`; there is no guidance to embed."""
        if isinstance(t, When):
            return t
        if isinstance(self.time_in, TimeNodes):
            return When(rows=self.time_in(t, None))
        return When(vector=F.silu(self.time_in(t)))

    def forward(
        self,
        x: Tensor,
        t: Tensor | When,
        cond: Tensor,
        guidance: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        when, config = self.when(t), self.config
        if config.in_channels:
            side = config.resolution // config.patch
            x = self.latent_in(patches(x, config.patch))
            x = x + place_embedding(side, config.hidden, x.dtype, x.device)
        for block in self.blocks.values():
            x = block(x, cond, when)
        return cube(self.final_layer(x), side, config.patch) if config.in_channels else x

    def without(self, *blocks: tuple[str, int]) -> FlowTransformer:
        """The same network, weights shared, without the given ("block", index)."""
        return leave_out(self, blocks)


def patches(x: Tensor, p: int) -> Tensor:
    """(B, C, R, R, R) to (B, (R/p)^3, C p^3): channel slowest, then the place in the patch."""
    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // p
    x = x.reshape(batch, channels, side, p, side, p, side, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, side**3, channels * p**3)


def cube(x: Tensor, side: int, p: int) -> Tensor:
    """The inverse of `patches`."""
    batch, channels = x.shape[0], x.shape[2] // p**3
    x = x.reshape(batch, side, side, side, channels, p, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, channels, *(3 * [side * p]))
