"""The bundled furniture model: a real, small image-to-shape DiT that compression can be judged on.

Its checkpoint has the released layout of the Hunyuan3D family (config.yaml, model.fp16.safetensors
with model.*, vae.*, conditioner.*), its DiT is the canonical class in 2mini's topology. Its own are
a small image encoder to 50 tokens, and a decoder to a dense 64^3 grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitapack.runtime.condition.conditioner import Conditioner, Picture
from vitapack.runtime.condition.images import recentre, separate
from vitapack.runtime.decode.decoders import Decoder
from vitapack.runtime.decode.mesh import surface_bytes
from vitapack.runtime.engines.choose import PLAIN, Execution
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.families.checkpoint import Checkpoint, check_part, network_shapes, shapes_of
from vitapack.runtime.families.family import Family
from vitapack.runtime.families.furniture.networks import (
    ANCHOR_CHANNELS,
    GRID,
    IMAGE,
    LATENT_TOKENS,
    FurnitureDecoder,
    FurnitureEncoder,
    FurnitureEncoderConfig,
    FurnitureVAEConfig,
    anchors,
)
from vitapack.runtime.families.hunyuan3d import dit_config
from vitapack.runtime.families.params import Params
from vitapack.runtime.families.probe import PathProbe
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.fill import fill
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.cancellation import cancellable
from vitapack.runtime.progress import Control

NAME = "furniture"
FOLDER = Path(__file__).resolve().parents[2] / "bundled" / "furniture"
# Logits live on cell centres; one ring of empty cells closes shapes that touch the border.
BOUNDS = 1 + 1 / GRID


@dataclass(frozen=True)
class HeldOut:
    """An image that the model was not trained on, with the true shape."""

    name: str
    image_path: Path
    distance: np.ndarray  # (64, 64, 64) int8, 1/32 cell, negative inside, clipped to +-2 cells
    label: dict[str, Any]  # id, category, autoencoder_iou, nearest_training_iou

    @property
    def solid(self) -> np.ndarray:
        return self.distance < 0

    @property
    def grid(self) -> np.ndarray:
        """As `FurnitureGrid` gives it, up to the scale: (66, 66, 66), positive inside."""
        return np.pad(-self.distance.astype(np.float32) / 32, 1, constant_values=-2.0)


def held_out(which: str = "unseen-views", folder: Path = FOLDER) -> Iterator[HeldOut]:
    """The bundled held-out sets: "unseen-views" of training shapes, "validation-shapes" and
    "test-shapes" of shapes not trained on (the last for a final table only)."""
    place = folder / "held-out" / which
    if not place.is_dir():
        raise UserError(f"{place}: no such held-out set; this installation lacks the bundled model")
    labels = json.loads((place / "labels.json").read_text())
    with np.load(place / "distances.npz") as distances:
        for name, label in labels.items():
            yield HeldOut(name, place / f"{name}.png", distances[name], label)


def preprocess(image: Image.Image, name: str = "image") -> Tensor:
    """(1, 112, 112) float32 grey levels in 0..1: the object centred on a white square."""
    rgb, alpha = separate(image, name)
    square = recentre(rgb, alpha, IMAGE, border=0.15, background=255)
    grey = np.asarray(Image.fromarray(square).convert("L"), dtype=np.float32) / 255
    return torch.from_numpy(grey)[None]


class FurnitureConditioner(Conditioner):
    """An image to condition tokens (1, 50, width), by an encoder of 1.9 M parameters."""

    def __init__(self, source: Source) -> None:
        config = encoder_config(source.config, f"{source.label}: conditioner")
        self.encoder = fill(lambda: FurnitureEncoder(config), source, PLAIN)

    @torch.no_grad()
    def __call__(
        self, image: Picture, name: str = "image", control: Control | None = None
    ) -> Tensor:
        if isinstance(image, Mapping):
            raise UserError(f"{name}: this model takes one image, not {len(image)} views")
        control = control or Control()
        control.step("condition", 0, 1)
        with cancellable(self.encoder, control):
            tokens = self.encoder(preprocess(image, name))
        control.report("condition", 1, 1)
        return tokens


class FurnitureGrid(Decoder):
    """Latents (1, 64, C) to logits (66, 66, 66), positive inside, on [-BOUNDS, BOUNDS]^3."""

    bounds = BOUNDS

    def __init__(self, source: Source, execution: Execution) -> None:
        config = decoder_config(source.config, f"{source.label}: shape decoder")
        self.config, self.on_cpu = config, execution.on_cpu
        self.network = fill(lambda: FurnitureDecoder(config), source, PLAIN)
        self.latent_shape = (LATENT_TOKENS, config.latent_channels)
        self.anchors = anchors()

    @property
    def working_bytes(self) -> int:
        return self.config.working_bytes if self.on_cpu else 0

    @property
    def surface_bytes(self) -> int:
        return surface_bytes(GRID) if self.on_cpu else 0

    @torch.no_grad()
    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        control = control or Control()
        control.step("decode", 0, 1)
        with cancellable(self.network, control):
            logits = self.network(latents.float())[0]
        control.report("decode", 1, 1)
        return np.pad(logits.numpy(), 1, constant_values=-4.0)


def conditioner(source: Source, execution: Execution, bits: int) -> FurnitureConditioner:
    """Both components are small: in memory from the start, in float32, on the CPU."""
    return FurnitureConditioner(source)


def shape_decoder(source: Source, execution: Execution) -> FurnitureGrid:
    return FurnitureGrid(source, execution)


def encoder_config(values: Mapping[str, Any], label: str) -> FurnitureEncoderConfig:
    """From `conditioner.params` of a config.yaml. Raises: FormatError."""
    params = Params(values, label)
    config = FurnitureEncoderConfig(
        width=params.size("width"), heads=params.size("heads"), layers=params.count("layers")
    )
    params.done()
    _expect_heads(config, label)
    return config


def _expect_heads(config: FurnitureEncoderConfig | FurnitureVAEConfig, label: str) -> None:
    if config.width % config.heads:
        raise FormatError(
            f"{label}: width {config.width} is not a multiple of heads {config.heads}"
        )


def decoder_config(values: Mapping[str, Any], label: str) -> FurnitureVAEConfig:
    """From `vae.params` of a config.yaml. Raises: FormatError."""
    params = Params(values, label)
    config = FurnitureVAEConfig(
        latent_channels=params.size("latent_channels"),
        width=params.size("width"),
        heads=params.size("heads"),
        layers=params.count("layers"),
        scale_factor=params.take("scale_factor", float, 1.0),
    )
    params.done()
    if not config.scale_factor > 0:
        raise FormatError(f"{label}: scale_factor is {config.scale_factor}; expected above 0")
    _expect_heads(config, label)
    return config


def read(probe: PathProbe) -> Checkpoint:
    """Reads the configuration and checks every tensor's name and shape; loads no tensor."""
    label = str(probe.folder / "config.yaml")
    config = dit_config(probe.params("model"), f"{label}: model.params")
    decoder = decoder_config(probe.params("vae"), f"{label}: vae.params")
    encoder = encoder_config(probe.params("conditioner"), f"{label}: conditioner.params")
    if config.in_channels != decoder.latent_channels + ANCHOR_CHANNELS:
        raise FormatError(
            f"{label}: in_channels is {config.in_channels}; expected latent_channels "
            f"{decoder.latent_channels} + {ANCHOR_CHANNELS} anchors"
        )
    check_part(probe.weights, "model", network_shapes(config), probe.path)
    for part, network in (
        ("vae", lambda: FurnitureDecoder(decoder)),
        ("conditioner", lambda: FurnitureEncoder(encoder)),
    ):
        check_part(probe.weights, part, shapes_of(network), probe.path)
    defaults = Params((probe.config or {}).get("pipeline") or {}, f"{label}: pipeline")
    sampler = SamplerDefaults(
        defaults.take("sampler", str, "euler"),
        steps=defaults.size("num_inference_steps", 20),
        guidance=defaults.take("guidance_scale", float, 2.0),
    )
    defaults.done()
    return Checkpoint(
        family=NAME,
        variant=NAME,
        path=probe.path,
        config=config,
        sampler=sampler,
        latents=(LATENT_TOKENS, decoder.latent_channels + ANCHOR_CHANNELS),
        decoder=decoder,
        scale_factor=decoder.scale_factor,
        weights=probe.weights,
        sections=probe.config or {},
    )


FAMILY = Family(
    name=NAME,
    looks_for="config.yaml with model.target ...FurnitureDiT next to model.fp16.safetensors",
    recognises=lambda probe: probe.target() == "FurnitureDiT",
    read=read,
    conditioner=conditioner,
    shape_decoder=shape_decoder,
    condition_tokens=lambda variant: 50,  # a summary token and 7 x 7 patches
)
