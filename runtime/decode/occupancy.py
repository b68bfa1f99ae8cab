"""TRELLIS' occupancy decoder: a latent cube to voxel logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class OccupancyConfig:
    latent_channels: int
    channels: tuple[int, ...]  # of the levels; each one after the first doubles the side
    blocks: int  # residual blocks per level
    middle: int  # residual blocks before the first level
    resolution: int = 16  # of the latent cube
    scale_factor: float = 1.0

    @property
    def side(self) -> int:
        """Voxels per side of the output: 64."""
        return self.resolution * 2 ** (len(self.channels) - 1)

    def working_bytes(self, dtype: torch.dtype) -> int:
        """Peak memory of decoding, excluding weights: four times the largest level's activations,
        and their channels-last normalisation."""
        levels = enumerate(self.channels)
        largest = max(channels * (self.resolution * 2**level) ** 3 for level, channels in levels)
        return int(4.25 * largest) * dtype.itemsize


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, D, H, W), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        moved = x.float().movedim(1, -1)
        return F.layer_norm(moved, self.normalized_shape, weight, bias, 1e-5).movedim(-1, 1).to(x)


def conv(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = conv(channels, channels)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))


class Upsample(nn.Module):
    """Doubles the side: each group of eight channels becomes a block of 2 x 2 x 2 cells."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, 8 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # (B, c, 2, 2, 2, D, H, W)
        batch, channels, _, _, _, *sides = x.shape
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(batch, channels, *(2 * side for side in sides))


class OccupancyDecoder(nn.Module):
    """Latents (B, 8, 16, 16, 16) to occupancy logits (B, 1, 64, 64, 64), positive inside.

    Parameter names are the released ones, so that the state dict needs no mapping.
    """

    def __init__(self, config: OccupancyConfig) -> None:
        super().__init__()
        self.config = config
        first, last = config.channels[0], config.channels[-1]
        self.input_layer = conv(config.latent_channels, first)
        self.middle_block = nn.Sequential(*(ResBlock(first) for _ in range(config.middle)))
        steps: list[nn.Module] = []
        for level, channels in enumerate(config.channels):
            if level:
                steps.append(Upsample(config.channels[level - 1], channels))
            steps += [ResBlock(channels) for _ in range(config.blocks)]
        self.blocks = nn.Sequential(*steps)
        self.out_layer = nn.Sequential(ChannelNorm(last), nn.SiLU(), conv(last, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.out_layer(self.blocks(self.middle_block(self.input_layer(latents))))
