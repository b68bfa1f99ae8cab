"""Whole tiny models of every family, picture to mesh, in the released layouts."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from vitapack.compressor.tools.random_checkpoint import Sizes, write
from vitapack.runtime.condition.dinov2 import Dinov2Config

SIZES = {
    "hunyuan3d": Sizes(
        hidden=64, heads=2, depth=(2, 2), latents=24, decoder_width=64, decoder_heads=2,
        decoder_layers=1, encoder=Dinov2Config(64, 2, 1, 14, 3, 0, 4, swiglu=True), pixels=42,
    ),
    "step1x": Sizes(
        hidden=64, heads=2, depth=(2, 2), latents=24, decoder_width=64, decoder_heads=2,
        decoder_layers=1, encoder=Dinov2Config(64, 2, 1, 14, 37, 4, 2, swiglu=False),
    ),
    "trellis": Sizes(
        hidden=64, heads=2, depth=(3,), latents=4, channels=(16, 8),
        encoder=Dinov2Config(64, 2, 1, 14, 37, 4, 2, swiglu=False),
    ),
}  # fmt: skip


def tiny_released(name: str, folder: Path, seed: int = 0) -> Path:
    """A random tiny model with the layout of the released `name`."""
    family = next(key for key in SIZES if name.startswith(key))
    write(name, folder, sizes=SIZES[family], seed=seed)
    return folder


def chair() -> Image.Image:
    """A transparent picture with something in it."""
    image = Image.new("RGBA", (90, 70))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 10, 60, 40), fill=(200, 80, 40, 255))
    draw.rectangle((20, 40, 26, 64), fill=(90, 50, 20, 255))
    draw.rectangle((54, 40, 60, 64), fill=(90, 50, 20, 255))
    return image
