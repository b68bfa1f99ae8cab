"""The ShapeVAE decoder: latent tokens and query points to occupancy logits, positive inside.

    decoder = load_shape_decoder(open_checkpoint(path))       # vitapack.runtime.pipeline.load
    field = decoder.field(latents)                            # latents (1, n, c) from the DiT
    grid = coarse_to_fine(field, 384, decoder.config.bounds)  # vitapack.runtime.decode.grid

Hunyuan3D 2.x (normal and turbo) and Step1X-3D share the graph; they differ in the fields of
`ShapeDecoderConfig`. Parameter names are the released ones, after the prefix `vae.`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitapack.runtime.decode.grid import Field


@dataclass(frozen=True)
class ShapeDecoderConfig:
    latents: int  # tokens
    channels: int  # per latent token
    width: int
    heads: int
    layers: int
    num_freqs: int
    include_pi: bool
    qkv_bias: bool
    qk_norm: bool
    scale_factor: float  # the DiT's latents are the autoencoder's times this
    geo_name: str = "geo_decoder"  # "decoder" in Step1X-3D
    geo_downsample: int = 1  # turbo: 2, half the width and heads (and no qk-norm) in the last block
    geo_mlp_expand: int = 4
    geo_ln_post: bool = True
    eps: float = 1e-6  # of every LayerNorm except the last, which has 1e-5
    bounds: float = 1.01
    level: float = 0.0  # logit at the surface

    @property
    def geo_width(self) -> int:
        return self.width // self.geo_downsample

    @property
    def geo_heads(self) -> int:
        return self.heads // self.geo_downsample

    def working_bytes(self, points: int, dtype: torch.dtype) -> int:
        """Peak memory of decoding, excluding weights: the transformer on all latents, or the
        cross-attention of `points` query points."""
        geo = self.geo_width
        tokens = self.latents * (3 + 2 * 4) * self.width
        point = (3 + 2 * self.geo_mlp_expand) * geo + 3 + 6 * self.num_freqs
        return dtype.itemsize * max(tokens, points * point + 2 * self.latents * geo)


class QKNorm(nn.Module):
    """LayerNorm with affine over the head dimension, eps 1e-6 in every variant."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(dim, eps=1e-6)
        self.k_norm = nn.LayerNorm(dim, eps=1e-6)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, heads: int, count: int) -> tuple[Tensor, ...]:
    """Splits (B, n, count * w) into `count` tensors (B, H, n, d); q, k, v are adjacent per head."""
    return x.unflatten(-1, (heads, count, -1)).permute(3, 0, 2, 1, 4).unbind(0)


class SelfAttention(nn.Module):
    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.c_qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        if config.qk_norm:
            self.attention = QKNorm(width // config.heads)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _heads(self.c_qkv(x), self.heads, 3)
        if self.qk_norm:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        return self.c_proj(_attend(q, k, v))


class CrossAttention(nn.Module):
    """Query points (B, P, w) attend to keys and values that are computed once per shape."""

    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        width, self.heads = config.geo_width, config.geo_heads
        self.c_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.qk_norm = config.qk_norm and config.geo_ln_post
        if self.qk_norm:
            self.attention = QKNorm(width // self.heads)

    def keys(self, tokens: Tensor) -> tuple[Tensor, ...]:
        k, v = _heads(self.c_kv(tokens), self.heads, 2)
        return (self.attention.k_norm(k) if self.qk_norm else k), v

    def forward(self, x: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
        (q,) = _heads(self.c_q(x), self.heads, 1)
        if self.qk_norm:
            q = self.attention.q_norm(q)
        return self.c_proj(_attend(q, *keys))


class MLP(nn.Module):
    def __init__(self, width: int, expand: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, expand * width)
        self.c_proj = nn.Linear(expand * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        width = config.geo_width
        self.ln_1 = nn.LayerNorm(width, eps=config.eps)
        self.ln_2 = nn.LayerNorm(width, eps=config.eps)
        self.attn = CrossAttention(config)
        self.ln_3 = nn.LayerNorm(width, eps=config.eps)
        self.mlp = MLP(width, config.geo_mlp_expand)

    def forward(self, x: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
        x = x + self.attn(self.ln_1(x), keys)
        return x + self.mlp(self.ln_3(x))


class Transformer(nn.Module):
    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class GeoDecoder(nn.Module):
    """One cross-attention block from query points to the shape's tokens."""

    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.geo_width
        self.query_proj = nn.Linear(3 + 6 * config.num_freqs, width)
        if config.geo_downsample != 1:
            self.latents_proj = nn.Linear(config.width, width)
        self.cross_attn_decoder = CrossBlock(config)
        if config.geo_ln_post:
            self.ln_post = nn.LayerNorm(width, eps=1e-5)
        self.output_proj = nn.Linear(width, 1)

    def keys(self, tokens: Tensor) -> tuple[Tensor, ...]:
        if self.config.geo_downsample != 1:
            tokens = self.latents_proj(tokens)
        block = self.cross_attn_decoder
        return block.attn.keys(block.ln_2(tokens))

    def forward(self, points: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
        x = fourier(points.float(), self.config).to(self.query_proj.weight.dtype)
        x = self.cross_attn_decoder(self.query_proj(x), keys)
        return self.output_proj(self.ln_post(x) if self.config.geo_ln_post else x)


def fourier(points: Tensor, config: ShapeDecoderConfig) -> Tensor:
    """Embeds points (..., 3) as (..., 3 + 6 F): [p | sin(p 2^j) | cos(p 2^j)],
    coordinate-major in sin and cos."""
    frequencies = 2.0 ** torch.arange(config.num_freqs, dtype=torch.float32, device=points.device)
    if config.include_pi:
        frequencies = frequencies * torch.pi
    angles = (points[..., None] * frequencies).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


class ShapeDecoder(nn.Module):
    def __init__(self, config: ShapeDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.post_kl = nn.Linear(config.channels, config.width)
        self.transformer = Transformer(config)
        # The released name, so that the state dict needs no mapping.
        self.add_module(config.geo_name, GeoDecoder(config))

    @property
    def geo(self) -> GeoDecoder:
        return getattr(self, self.config.geo_name)

    def tokens(self, latents: Tensor) -> Tensor:
        """The DiT's latents (B, n, c) to decoded tokens (B, n, width)."""
        return self.transformer(self.post_kl(latents / self.config.scale_factor))

    def forward(self, latents: Tensor, points: Tensor) -> Tensor:
        """Latents (B, n, c) and points (B, P, 3) to logits (B, P, 1)."""
        geo = self.geo
        return geo(points, geo.keys(self.tokens(latents)))

    def field(self, latents: Tensor) -> Field:
        """The logit field of one shape, (1, n, c); its tokens and keys are computed once."""
        with torch.inference_mode():
            keys = self.geo.keys(self.tokens(latents.to(self.post_kl.weight.dtype)))

        def logits(points: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.geo(points[None], keys)[0, :, 0].float()

        return logits
