"""TRELLIS: the sparse-structure flow transformer, with one block kind.

A latent cube (8 channels, 16 cells per side) becomes 4096 tokens, to which position embeddings are
added; 24 blocks of modulated self-attention, plain cross-attention to the condition tokens and a
modulated MLP turn them into a velocity. Names follow `runtime/networks/dit.py` for the same layers
(`latent_in`, `time_in`, `mod.lin`); `runtime/families/trellis.py` maps the released names. The
structured-latent (SLAT) flow has the same blocks between sparse convolutions; only its blocks are
implemented here.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.architecture import FlowConfig, TimeEmbedding
from vitapack.runtime.networks.blocks import Condition, attention, mlp, modulate
from vitapack.runtime.networks.modulation import Modulation, StepModulation, TimeMLP
from vitapack.runtime.networks.network import CallShape, Network


def trellis_time(hidden: int) -> TimeEmbedding:
    """The time embedding of TRELLIS: t in 0..1000, [cos | sin] of 256 channels."""
    return TimeEmbedding(256, hidden, 1.0, 10_000.0, cos_first=True, activation="silu")


@functools.lru_cache(maxsize=4)
def position_embedding(
    side: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(side^3, channels): [sin | cos] of each coordinate, padded with zeros.

    Released files hold it as the buffer `pos_emb` of 16.8 MB; here it is computed, and cached on
    the device, so that no step copies it to a GPU.
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
    """Attention to the condition tokens, without normalisation and gate.

    With a single condition token the output is its value, whatever the queries are.
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
        self.mod = Modulation(config.hidden, 2)
        self.self_attn = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(config.hidden, eps=1e-6)
        self.cross_attn = CrossAttention(config)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, cond: Tensor, step: StepModulation) -> Tensor:
        """Tokens x (B, n, h) and condition tokens cond (B, C, D)."""
        mod1, mod2 = self.mod(step)
        x = x + mod1.gate * self.self_attn(modulate(x, mod1.shift, mod1.scale))
        x = x + self.cross_attn(self.cross_norm(x), cond)
        return x + mod2.gate * self.mlp(modulate(x, mod2.shift, mod2.scale))


class OutLayer(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.token_channels)

    @staticmethod
    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class FlowTransformer(Network):
    """Velocity of the latents: x (B, C, R, R, R), t (B,) or (1,) in 0..1000, cond (B, N, D).

    Without edges (SLAT) x holds the blocks' own tokens (B, n, h), positions included, and so does
    the output. Repeated condition tokens change nothing: softmax over equal keys is their value.
    """

    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        if config.has_edges:
            self.latent_in = nn.Linear(config.token_channels, config.hidden)
        self.time_in: nn.Module = TimeMLP(config.time, config.hidden)
        self.blocks = nn.ModuleDict({str(index): FlowBlock(config) for index in config.blocks})
        if config.has_edges:
            self.final_layer = OutLayer(config)

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        config, tokens = self.config, condition.tokens
        if config.has_edges:
            side = config.resolution // config.patch
            x = self.latent_in(patches(x, config.patch))
            x = x + position_embedding(side, config.hidden, x.dtype, x.device)
        for block in self.blocks.values():
            x = block(x, tokens, step)
        return cube(self.final_layer(x), side, config.patch) if config.has_edges else x

    @classmethod
    def step_bytes(cls, config: FlowConfig, call: CallShape) -> int:
        h, m, size = config.hidden, config.mlp_hidden, call.dtype.itemsize
        tokens = token_count(config, call)
        # x of the caller and of the block, the MLP's input, its two tensors of width m.
        weight = h * m * size if call.packed and call.compute == "a16" else 0  # expanded to floats
        working = call.batch * tokens * (3 * h + 2 * m) * size
        return given_bytes(config, call) + working + weight


def token_count(config: FlowConfig, call: CallShape) -> int:
    """Number of tokens of the latent cube; for SLAT's blocks alone that of the call."""
    return (config.resolution // config.patch) ** 3 or call.latents[0]


def given_bytes(config: FlowConfig, call: CallShape) -> int:
    """Bytes of input and output tokens and of the condition tokens."""
    values = 2 * token_count(config, call) * config.token_channels
    values += call.cond_tokens * config.cond_channels
    return call.batch * values * call.dtype.itemsize


def patches(x: Tensor, p: int) -> Tensor:
    """(B, C, R, R, R) to (B, (R/p)^3, C p^3): channel slowest, then the cell in the patch."""
    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // p
    x = x.reshape(batch, channels, side, p, side, p, side, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, side**3, channels * p**3)


def cube(x: Tensor, side: int, p: int) -> Tensor:
    """The inverse of `patches`."""
    batch, channels = x.shape[0], x.shape[2] // p**3
    x = x.reshape(batch, side, side, side, channels, p, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, channels, *(3 * [side * p]))
