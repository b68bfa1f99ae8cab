"""The bundled furniture model's two small networks: image encoder and shape decoder.

The DiT is the canonical one (`vitapack.runtime.networks.dit`). The encoder has DINOv2's role: it
was trained first, then frozen, and gives 50 condition tokens. The decoder turns 64 latent tokens,
each anchored to a cell of a 4^3 lattice, into occupancy logits at 64^3 cell centres of [-1, 1]^3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = 64  # cells per side
IMAGE = 112  # pixels per side
LATENT_TOKENS = 64  # a 4^3 lattice, x slowest
ANCHOR_CHANNELS = 12  # of the DiT's input, after the latent channels: the token's position


def anchors() -> Tensor:
    """(64, 12): the lattice cell of each latent token, one-hot per axis, centred, in unit scale.

    The canonical DiT has no positional encoding, since Hunyuan3D's latents are a set. These latents
    are not a set, so additional channels hold their positions, equal in noise and data: their
    velocity is zero, and the network is still the canonical one.
    """
    places = torch.stack(torch.meshgrid(*[torch.arange(4)] * 3, indexing="ij"), dim=-1).reshape(
        LATENT_TOKENS, 3
    )
    return (F.one_hot(places, 4).flatten(1).float() - 0.25) * (4 / 3**0.5)


@dataclass(frozen=True)
class FurnitureVAEConfig:
    latent_channels: int = 16
    width: int = 192
    heads: int = 4
    layers: int = 2
    scale_factor: float = 1.0  # the DiT's latents are the autoencoder's times this

    @property
    def working_bytes(self) -> int:
        """Peak memory of decoding in float32, excluding weights: the last 3^3 convolution of 16
        channels at 32^3. Below 20480 C x D x H torch unfolds its input instead of calling oneDNN,
        and holds three more copies of it: 60 MiB, measured 58 (torch 2.13)."""
        return 4 * 16 * 32**3 * (27 + 3)


@dataclass(frozen=True)
class FurnitureEncoderConfig:
    width: int = 192
    heads: int = 4
    layers: int = 4


def embedding(tokens: int, width: int) -> nn.Parameter:
    """A learned embedding, drawn with standard deviation 0.02.

    Not drawn on the meta device, where a module is made before it is filled: torch would import its
    compiler for that, 155 MiB and two seconds (torch 2.13).
    """
    values = torch.empty(tokens, width)
    return nn.Parameter(values if values.is_meta else values.normal_(std=0.02))


class Attention(nn.Module):
    """Plain multi-head attention; keys and values are computed from `context` (default: x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Explicit softmax: at under 100 tokens it trains 1.8x faster on CPUs than the fused one.
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvBlock(nn.Module):
    """Residual 3^3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels // 4), channels)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class FurnitureDecoder(nn.Module):
    """Latent tokens (B, 64, C) to occupancy logits (B, 64, 64, 64), positive inside.

    Channels after the latent ones (the anchors) are ignored.
    """

    def __init__(self, config: FurnitureVAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.post_kl = nn.Linear(config.latent_channels, width)
        self.position = embedding(LATENT_TOKENS, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.up8 = nn.ConvTranspose3d(width, 96, 2, stride=2)
        self.conv8 = ConvBlock(96)
        self.up16 = nn.ConvTranspose3d(96, 48, 2, stride=2)
        self.conv16 = ConvBlock(48)
        self.up32 = nn.ConvTranspose3d(48, 16, 2, stride=2)
        self.conv32 = ConvBlock(16)
        self.out = nn.Conv3d(16, 8, 3, padding=1)  # the 8 cells of each 2^3

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents[..., : self.config.latent_channels]
        x = self.post_kl(latents / self.config.scale_factor) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).transpose(1, 2).unflatten(2, (4, 4, 4))
        x = self.conv8(self.up8(x))
        x = self.conv16(self.up16(x))
        x = self.conv32(self.up32(x))
        x = self.out(F.silu(x)).unflatten(1, (2, 2, 2))  # (B, i, j, k, X, Y, Z)
        return x.permute(0, 4, 1, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class FurnitureEncoder(nn.Module):
    """Grey images (B, 112, 112) in 0..1 on white to condition tokens (B, 50, width)."""

    def __init__(self, config: FurnitureEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(24, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )
        self.position = embedding(49, width)
        self.summary = embedding(1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        # White is 0, so that the padding of the convolutions looks like the background.
        x = self.stem(1 - images[:, None]).flatten(2).transpose(1, 2) + self.position
        x = torch.cat([self.summary.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
