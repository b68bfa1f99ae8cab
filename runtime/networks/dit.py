"""The canonical double/single-block DiT: Hunyuan3D's, and with other names Step1X-3D's.

Read top to bottom it is Fig. 2 of the paper: two token streams (latents and image condition) meet
in joint attention in the double blocks, are then concatenated [condition ; latents], pass the
single blocks, and the latent tokens leave as a velocity. Parameter names are those of the released
Hunyuan3D checkpoints (after their prefix `model.`), so that family needs no key mapping.

Pruning is a list: `DiTConfig.double_blocks` and `.single_blocks` hold the ORIGINAL indices of the
blocks that are kept, and parameters keep those indices in their names. A linear is anything that is
called on x: `nn.Linear` here, `vitapack.runtime.networks.linear.PackedLinear` in a packed model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.architecture import DOUBLE_SINGLE
from vitapack.runtime.networks.blocks import (
    BlockSizes,
    QKNorm,
    attention,
    clipped,
    leave_out,
    mlp,
    modulate,
    multiplicity,
)
from vitapack.runtime.networks.modulation import (
    Modulation,
    ModulationTable,
    TimeEmbedding,
    TimeMLP,
    TimeNodes,
    When,
)


@dataclass(frozen=True)
class DiTConfig(BlockSizes):
    """Hyper-parameters of one (possibly pruned) network."""

    network_kind: ClassVar[str] = DOUBLE_SINGLE

    in_channels: int
    cond_channels: int
    hidden: int
    heads: int
    double_blocks: tuple[int, ...]  # original indices of the kept blocks, ascending
    single_blocks: tuple[int, ...]
    mlp_ratio: float
    qkv_bias: bool
    guidance_embed: bool
    time: TimeEmbedding

    @property
    def clips(self) -> bool:
        """Step1X-3D's class holds its token streams inside fp16's range where it runs in fp16,
        Hunyuan3D's does not: one value that overflows there is NaN everywhere a layer later. Their
        networks differ in the time MLP's activation."""
        return self.time.activation == "gelu"


def hunyuan_time(hidden: int) -> TimeEmbedding:
    """The time embedding of the Hunyuan3D family: t in 0..1, [cos | sin] of 256 channels."""
    return TimeEmbedding(256, hidden, 1000.0, 1000.0, cos_first=True, activation="silu")


class StreamAttention(nn.Module):
    """The projections of one stream: (B, n, h) to q, k, v of (B, H, n, d), and back."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return *self.norm(q, k), v


class DoubleBlock(nn.Module):
    """Two streams with their own weights, joined in one attention over [condition ; latents]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.clips = config.clips
        self.img_mod = Modulation(config.hidden, 6)
        self.img_attn = StreamAttention(config)
        self.img_mlp = mlp(config)
        self.txt_mod = Modulation(config.hidden, 6)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = mlp(config)

    def forward(
        self, x: Tensor, y: Tensor, when: When, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents x (B, L, h), condition y (B, C, h), bias (1, C+L) of the keys in attention."""
        x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = self.img_mod(when)
        y_shift1, y_scale1, y_gate1, y_shift2, y_scale2, y_gate2 = self.txt_mod(when)
        x_qkv = self.img_attn(modulate(x, x_shift1, x_scale1))
        y_qkv = self.txt_attn(modulate(y, y_shift1, y_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(y_qkv, x_qkv, strict=True))
        joint = attention(q, k, v, bias)
        y_out, x_out = joint.split([y.shape[1], x.shape[1]], dim=1)
        x = clipped(x + x_gate1 * self.img_attn.proj(x_out), self.clips)
        x = x + x_gate2 * self.img_mlp(modulate(x, x_shift2, x_scale2))
        y = clipped(y + y_gate1 * self.txt_attn.proj(y_out), self.clips)
        y = y + y_gate2 * self.txt_mlp(modulate(y, y_shift2, y_scale2))
        return clipped(x, self.clips), clipped(y, self.clips)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over all tokens, with fused input and output projections."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.clips, self.heads = config.clips, config.heads
        self.widths = [3 * config.hidden, config.mlp_hidden]
        self.linear1 = nn.Linear(config.hidden, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden + config.mlp_hidden, config.hidden)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden, 3)

    def forward(self, z: Tensor, when: When, bias: Tensor | None = None) -> Tensor:
        """All tokens z (B, C+L, h), condition first; bias (1, C+L) of the keys in attention."""
        shift, scale, gate = self.modulation(when)
        qkv, wide = self.linear1(modulate(z, shift, scale)).split(self.widths, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k)
        out = torch.cat([attention(q, k, v, bias), F.gelu(wide, approximate="tanh")], dim=-1)
        return clipped(z + gate * self.linear2(out), self.clips)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.in_channels)
        # Named as in the released files: element 0 is the SiLU, which `When` already holds.
        self.adaLN_modulation = nn.ModuleList(
            [nn.Identity(), nn.Linear(config.hidden, 2 * config.hidden)]
        )

    def shift_scale(self, when: When) -> tuple[Tensor, ...]:
        """Modulation (B or 1, 1, h) each, from the weights or from their table."""
        modulation = self.adaLN_modulation[1]
        if isinstance(modulation, ModulationTable):
            return modulation(when)
        return modulation(when.vector)[:, None].chunk(2, dim=-1)

    def forward(self, x: Tensor, when: When) -> Tensor:
        return self.linear(modulate(x, *self.shift_scale(when)))


class DiT(nn.Module):
    """Velocity of the latents: x (B, L, C), t (B,) or (1,), cond (B, N, D) -> (B, L, C).

    t may also be what `when` made of it: then a call never looks at values, as CUDA graphs need it.

    With `repeats` every token of cond stands for so many equal ones. Condition tokens have no
    places, so equal ones stay equal through all blocks: the unconditional pass, whose tokens are
    all zeros, is this network on a single one, exactly (see `vitapack.runtime.sampling.guidance`).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_in = nn.Linear(config.in_channels, config.hidden)
        self.cond_in = nn.Linear(config.cond_channels, config.hidden)
        self.time_in: nn.Module = TimeMLP(config.time, config.hidden)
        if config.guidance_embed:
            self.guidance_in = TimeMLP(config.time, config.hidden)
        self.double_blocks = nn.ModuleDict(
            {str(index): DoubleBlock(config) for index in config.double_blocks}
        )
        self.single_blocks = nn.ModuleDict(
            {str(index): SingleBlock(config) for index in config.single_blocks}
        )
        self.final_layer = FinalLayer(config)

    def when(self, t: Tensor | When, guidance: Tensor | None = None) -> When:
        """The step's modulation input; one that was made before stays as it is. Raises ValueError
        for a guidance-embedded model without a guidance value, and for a time that the modulation
        tables do not hold, for which it looks at the times on the host."""
        if isinstance(t, When):
            return t
        if self.config.guidance_embed and guidance is None:
            raise ValueError("this model embeds its guidance: pass guidance as a (B,) tensor")
        if isinstance(self.time_in, TimeNodes):
            return When(rows=self.time_in(t, guidance))
        vector = self.time_in(t)
        if self.config.guidance_embed:
            vector = vector + self.guidance_in(guidance)
        return When(vector=F.silu(vector))

    def forward(
        self,
        x: Tensor,
        t: Tensor | When,
        cond: Tensor,
        guidance: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        when = self.when(t, guidance)
        x, y = self.latent_in(x), self.cond_in(cond)
        bias = multiplicity(repeats, y.shape[1], x.shape[1], x)
        for block in self.double_blocks.values():
            x, y = block(x, y, when, bias)
        z = torch.cat([y, x], dim=1)
        for block in self.single_blocks.values():
            z = block(z, when, bias)
        return self.final_layer(z[:, y.shape[1] :], when)

    def without(self, *blocks: tuple[str, int]) -> DiT:
        """The same network, weights shared, without the given ("double" | "single", index)."""
        return leave_out(self, blocks)
