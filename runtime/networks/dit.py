"""The canonical double/single-block DiT: Hunyuan3D's and, under other names, Step1X-3D's.

Read from top to bottom it is Fig. 2 of the paper: two token streams (latents `img`, condition
`txt`) meet in joint attention in the double blocks, are concatenated [condition ; latents], pass
through the single blocks, and the latent tokens become a velocity. Parameter names are those of
the released Hunyuan3D checkpoints (after `model.`), so that family needs no key mapping.

Pruning is a list: `DiTConfig.double_blocks` and `.single_blocks` hold the ORIGINAL indices of the
kept blocks, and parameters keep those indices in their names. The linears are `nn.Linear` here and
packed ones in a packed network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.format.architecture import DiTConfig, TimeEmbedding
from vitapack.runtime.networks.blocks import (
    Condition,
    QKNorm,
    attention,
    clipped,
    mlp,
    modulate,
    repeated_key_bias,
)
from vitapack.runtime.networks.modulation import (
    Modulation,
    ModulationTable,
    StepModulation,
    TimeMLP,
)
from vitapack.runtime.networks.network import CallShape, Network


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
        self.img_mod = Modulation(config.hidden, 2)
        self.img_attn = StreamAttention(config)
        self.img_mlp = mlp(config)
        self.txt_mod = Modulation(config.hidden, 2)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = mlp(config)

    def forward(
        self, img: Tensor, txt: Tensor, step: StepModulation, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents img (B, L, h), condition txt (B, C, h), bias (1, C+L) of the attention's keys."""
        img1, img2 = self.img_mod(step)
        txt1, txt2 = self.txt_mod(step)
        img_qkv = self.img_attn(modulate(img, img1.shift, img1.scale))
        txt_qkv = self.txt_attn(modulate(txt, txt1.shift, txt1.scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        joint = attention(q, k, v, bias)
        txt_out, img_out = joint.split([txt.shape[1], img.shape[1]], dim=1)
        img = clipped(img + img1.gate * self.img_attn.proj(img_out), self.clips)
        img = img + img2.gate * self.img_mlp(modulate(img, img2.shift, img2.scale))
        txt = clipped(txt + txt1.gate * self.txt_attn.proj(txt_out), self.clips)
        txt = txt + txt2.gate * self.txt_mlp(modulate(txt, txt2.shift, txt2.scale))
        return clipped(img, self.clips), clipped(txt, self.clips)


class SingleBlock(nn.Module):
    """Attention and MLP in parallel over all tokens, with fused input and output projections."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.clips, self.heads = config.clips, config.heads
        self.widths = [3 * config.hidden, config.mlp_hidden]
        self.linear1 = nn.Linear(config.hidden, sum(self.widths))
        self.linear2 = nn.Linear(config.hidden + config.mlp_hidden, config.hidden)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(config.hidden, 1)

    def forward(self, z: Tensor, step: StepModulation, bias: Tensor | None = None) -> Tensor:
        """All tokens z (B, C+L, h), condition first; bias (1, C+L) of the attention's keys."""
        (mod,) = self.modulation(step)
        qkv, wide = self.linear1(modulate(z, mod.shift, mod.scale)).split(self.widths, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k)
        out = torch.cat([attention(q, k, v, bias), F.gelu(wide, approximate="tanh")], dim=-1)
        return clipped(z + mod.gate * self.linear2(out), self.clips)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.in_channels)
        # Named as in the released files: element 0 is the SiLU, already applied to the vector.
        self.adaLN_modulation = nn.ModuleList(
            [nn.Identity(), nn.Linear(config.hidden, 2 * config.hidden)]
        )

    def shift_scale(self, step: StepModulation) -> tuple[Tensor, ...]:
        """Shift and scale, (B or 1, 1, h) each, from the weights or from their table."""
        modulation = self.adaLN_modulation[1]
        if isinstance(modulation, ModulationTable):
            return modulation.chunks(step)
        return modulation(step.vector)[:, None].chunk(2, dim=-1)

    def forward(self, x: Tensor, step: StepModulation) -> Tensor:
        return self.linear(modulate(x, *self.shift_scale(step)))


class DiT(Network):
    """Velocity of the latents: x (B, L, C), t (B,) or (1,), cond (B, N, D) -> (B, L, C).

    t may be a precomputed StepModulation; forward then reads no tensor values on the host, as CUDA
    graphs require. cond may be a `Condition`, whose tokens count as several equal ones each.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
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

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        img, txt = self.latent_in(x), self.cond_in(condition.tokens)
        bias = repeated_key_bias(condition, img)
        for block in self.double_blocks.values():
            img, txt = block(img, txt, step, bias)
        z = torch.cat([txt, img], dim=1)
        for block in self.single_blocks.values():
            z = block(z, step, bias)
        return self.final_layer(z[:, txt.shape[1] :], step)

    @classmethod
    def step_bytes(cls, config: DiTConfig, call: CallShape) -> int:
        h, m = config.hidden, config.mlp_hidden
        latents, cond = call.latents[0], call.cond_tokens
        tokens = latents + cond
        # Single block: z and both streams of the caller, linear1's 3h + m, q and k, attention, the
        # MLP's m, and both concatenated. Double block: both streams of caller and block, q, k and v
        # twice, attention, then the MLP of the longer stream.
        single = tokens * (8 * h + 3 * m) if config.single_blocks else 0
        double = tokens * 10 * h + max(latents, cond) * (3 * h + 2 * m)
        largest = max(single, double if config.double_blocks else 0)
        return given_bytes(config, call) + call.batch * largest * call.dtype.itemsize


def given_bytes(config: DiTConfig, call: CallShape) -> int:
    """Bytes of input and output latents and of the condition tokens."""
    values = 2 * call.latents[0] * config.in_channels + call.cond_tokens * config.cond_channels
    return call.batch * values * call.dtype.itemsize
