"""A real pipeline small enough for tests: random DiT, analytic decoder, pictures as tokens.

A module of its own, so that worker processes can import it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitapack.runtime.condition.conditioner import Conditioner
from vitapack.runtime.decode.decoders import Decoder
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.networks.dit import DiT, hunyuan_time
from vitapack.runtime.pipeline.pipeline import Origin, Pipeline
from vitapack.runtime.progress import Control

HIDDEN = 16
IDLE = (("double", 1), ("single", 2))  # blocks whose gates are zero: leaving them out is exact
STRONG = {"double": 0, "single": 0}  # blocks that add by far the most


class Tokens(Conditioner):
    """A picture as (1, 4, 6) numbers; a black one has no object."""

    def __call__(
        self, image: Image.Image, name: str = "image", control: Control | None = None
    ) -> Tensor:
        pixels = np.asarray(image.convert("RGB").resize((4, 2)), dtype=np.float32) / 127.5 - 1
        if pixels.max() == -1:
            raise UserError(f"{name}: no object in this picture")
        return torch.from_numpy(pixels.reshape(1, 4, 6).copy())


class Ellipsoids(Decoder):
    """Two ellipsoids whose half axes and places are squashed latents: (R, R, R), inside > 0."""

    bounds = 1.0
    latent_shape = (4, 3)
    anchors = torch.zeros(4, 0)  # this family adds no places to its latents

    def __init__(self, resolution: int = 20, shift: float = 0.0) -> None:
        self.resolution, self.shift = resolution, shift

    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        axis = np.linspace(-1, 1, self.resolution)
        nodes = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
        z = np.tanh(latents[0].numpy().astype(np.float64) / 2)
        fields = []
        for size, place in ((z[0], z[1]), (z[2], z[3])):
            fields.append(1 - np.square((nodes - 0.35 * place) / (0.35 + 0.2 * size)).sum(-1))
        return (np.maximum(*fields) + self.shift).astype(np.float32)


def tiny_pipeline(decoder: Ellipsoids | None = None) -> Pipeline:
    """3 double and 4 single blocks with weak gates, two idle blocks, one strong of each kind."""
    config = DiTConfig(
        in_channels=3,
        cond_channels=6,
        hidden=HIDDEN,
        heads=2,
        double_blocks=(0, 1, 2),
        single_blocks=(0, 1, 2, 3),
        mlp_ratio=2.0,
        qkv_bias=True,
        guidance_embed=False,
        time=hunyuan_time(HIDDEN),
    )
    rng = torch.Generator().manual_seed(5)
    dit = DiT(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * spread)
    for kind, blocks in (("double", dit.double_blocks), ("single", dit.single_blocks)):
        for index, block in blocks.items():
            idle = (kind, int(index)) in IDLE
            factor = 0.0 if idle else 4.0 if STRONG[kind] == int(index) else 0.4
            for lin, chunks in gates(block):
                for chunk in chunks:
                    rows = slice(chunk * HIDDEN, (chunk + 1) * HIDDEN)
                    lin.weight[rows] *= factor
                    lin.bias[rows] *= factor
    return Pipeline(
        dit,
        SamplerDefaults("euler", steps=3, guidance=2.0),
        Tokens(),
        decoder or Ellipsoids(),
        Origin("tiny", "tiny/model.safetensors", "0" * 64),
    )


def gates(block: torch.nn.Module) -> list[tuple[torch.nn.Linear, tuple[int, ...]]]:
    """The modulation linears of a block with the chunks that are gates."""
    if hasattr(block, "img_mod"):
        return [(block.img_mod.lin, (2, 5)), (block.txt_mod.lin, (2, 5))]
    return [(block.modulation.lin, (2,))]


def pictures(count: int) -> list[tuple[str, Image.Image]]:
    rng = np.random.default_rng(1)
    return [
        (f"picture{i}", Image.fromarray(rng.integers(0, 256, (2, 4, 3), dtype=np.uint8)))
        for i in range(count)
    ]


class Vanishing(Ellipsoids):
    """No surface for small latents, as they are without double block 0 (below 1.0, full above)."""

    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        grid = super().__call__(latents)
        return grid if latents.abs().mean() > self.least else np.full_like(grid, -1)

    least = 1.0
