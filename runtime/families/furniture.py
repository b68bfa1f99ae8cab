"""The bundled furniture model: a real, small image-to-shape DiT that compression can be judged on.

Its checkpoint has the released layout of the Hunyuan3D family (config.yaml, model.fp16.safetensors
with model.*, vae.*, conditioner.*), its DiT is the canonical class in 2mini's topology. What is its
own: pictures become 50 tokens through a small encoder, latents a dense 64^3 grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitapack.runtime.errors import UserError
from vitapack.runtime.furniture_model import (
    GRID,
    IMAGE,
    LATENT_TOKENS,
    FurnitureDecoder,
    FurnitureEncoder,
    FurnitureEncoderConfig,
    FurnitureVAEConfig,
)
from vitapack.runtime.images import recentre, separate

FOLDER = Path(__file__).resolve().parent.parent / "bundled" / "furniture"
# Logits live on cell centres; one ring of empty cells closes shapes that touch the border.
BOUNDS = 1 + 1 / GRID


@dataclass(frozen=True)
class HeldOut:
    """A picture that was never trained on, with the true shape."""

    name: str
    image_path: Path
    distance: np.ndarray  # (64, 64, 64) int8, 1/32 cell, negative inside, clipped to +-2 cells
    label: dict[str, Any]  # id, category, autoencoder_iou, nearest_training_iou

    @property
    def solid(self) -> np.ndarray:
        return self.distance < 0

    @property
    def grid(self) -> np.ndarray:
        """What `ShapeDecoder` would give for it, up to the scale: (66, 66, 66), positive inside."""
        return np.pad(-self.distance.astype(np.float32) / 32, 1, constant_values=-2.0)


def held_out(which: str = "unseen-views", folder: Path = FOLDER) -> Iterator[HeldOut]:
    """The bundled held-out sets: "unseen-views" of training shapes, "validation-shapes" and
    "test-shapes" that were never seen at all (the last one only for a final table)."""
    place = folder / "held-out" / which
    if not place.is_dir():
        raise UserError(f"{place}: no such held-out set; this installation lacks the bundled model")
    labels = json.loads((place / "labels.json").read_text())
    with np.load(place / "distances.npz") as distances:
        for name, label in labels.items():
            yield HeldOut(name, place / f"{name}.png", distances[name], label)


def _config(kind: type, params: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(params) - known):
        raise UserError(
            f"config.yaml: unknown parameters {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return kind(**params)


def preprocess(image: Image.Image, name: str = "image") -> Tensor:
    """(1, 112, 112) float32 grey in 0..1: the object in the middle of a white square."""
    rgb, alpha = separate(image, name)
    square = recentre(rgb, alpha, IMAGE, border=0.15, background=255)
    grey = np.asarray(Image.fromarray(square).convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(grey)[None]


class Conditioner:
    """A picture to condition tokens (1, 50, width); unconditional tokens are zeros."""

    def __init__(self, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.encoder = FurnitureEncoder(_config(FurnitureEncoderConfig, params)).eval()
        load_into(self.encoder, tensors, "conditioner")

    @torch.no_grad()
    def __call__(self, image: Image.Image, name: str = "image") -> Tensor:
        return self.encoder(preprocess(image, name))


class ShapeDecoder:
    """Latents (1, 64, C) to logits (66, 66, 66), positive inside, on [-BOUNDS, BOUNDS]^3."""

    bounds = BOUNDS

    def __init__(self, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = _config(FurnitureVAEConfig, params)
        self.decoder = FurnitureDecoder(self.config).eval()
        load_into(self.decoder, tensors, "vae")
        self.latent_shape = (LATENT_TOKENS, self.config.latent_channels)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> np.ndarray:
        logits = self.decoder(latents.float())[0]
        return np.pad(logits.numpy(), 1, constant_values=-4.0)


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], part: str) -> None:
    """Loads every tensor as float32; a missing, unexpected or mis-shaped one is named."""
    wanted = module.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"{part}: {len(missing)} tensors are missing, first {missing[0]}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{part}: {len(extra)} tensors are unexpected, first {extra[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{part}.{name}: found shape {tuple(tensor.shape)}, "
                f"expected {tuple(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{part}.{name}: holds NaN or infinite values; the file is damaged")
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
