"""Latents to the grid of logits that the surface is taken from, positive inside.

A decoder says `latent_shape` and `bounds` without being loaded; `decoder(latents)` loads it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vitapack.runtime.decode.grid import CHUNKS, coarse_to_fine, dense
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.decode.predict import (
    occupancy_bytes,
    refine_bytes,
    surface_bytes,
    volume_bytes,
)
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.loading.fill import Net, fill, filled_bytes
from vitapack.runtime.loading.lazy import Part
from vitapack.runtime.loading.memory import holes_kept
from vitapack.runtime.loading.source import Source


class VolumeDecoder:
    """A ShapeVAE: latents (1, n, c) to (R + 1)^3 logits, evaluated near the surface only."""

    def __init__(
        self, decoder: Part[ShapeDecoder], config: ShapeDecoderConfig, device: str = "cpu"
    ) -> None:
        self.decoder, self.config, self.device = decoder, config, device
        self.latent_shape: tuple[int, ...] = (config.latents, config.channels)
        self.bounds = config.bounds
        self.resolution = 384  # of the published pipelines
        self.dense = False  # every node, for comparisons
        self.queries = 0  # of the last shape

    @property
    def working_bytes(self) -> int:
        """Of the network at work, and on a CPU of the grid, which always lies there."""
        grid = refine_bytes(self.resolution) if self.device == "cpu" else 0
        return self.decoder.working_bytes + grid

    @property
    def surface_bytes(self) -> int:
        """Of the surface's extraction, which needs no network."""
        return surface_bytes(self.resolution) if self.device == "cpu" else 0

    def __call__(self, latents: Tensor) -> np.ndarray:
        network = self.decoder()
        device = network.post_kl.weight.device
        evaluate = dense if self.dense else coarse_to_fine
        field = network.field(latents.to(device))
        with holes_kept():
            grid = evaluate(field, self.resolution, self.bounds, device=device)
        self.queries = grid.queries
        return grid.values.numpy()


class OccupancyGrid:
    """TRELLIS: latents (1, 8, 16, 16, 16) to logits at the centres of 64^3 voxels.

    One ring of empty voxels closes shapes that touch the border. TRELLIS' z points up; the grid is
    turned to y up, front +z, like everything else here.
    """

    def __init__(
        self, decoder: Part[OccupancyDecoder], config: OccupancyConfig, device: str = "cpu"
    ) -> None:
        self.decoder, self.config, self.device = decoder, config, device
        side = config.resolution
        self.latent_shape: tuple[int, ...] = (config.latent_channels, side, side, side)
        self.bounds = 0.5 + 0.5 / config.side

    @property
    def working_bytes(self) -> int:
        return self.decoder.working_bytes

    @property
    def surface_bytes(self) -> int:
        return surface_bytes(self.config.side) if self.device == "cpu" else 0

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> np.ndarray:
        network = self.decoder()
        logits = network(latents.to(network.input_layer.weight))[0, 0].float().cpu().numpy()
        turned = logits.transpose(0, 2, 1)[:, :, ::-1]  # (x, y, z) to (x, z, -y)
        return np.pad(turned, 1, constant_values=min(-1.0, float(logits.min())))


def volume_decoder(
    source: Source, config: ShapeDecoderConfig, dtype: torch.dtype, device: str | torch.device
) -> VolumeDecoder:
    working = volume_bytes(config, CHUNKS[torch.device(device).type], dtype)
    part = _part(lambda: ShapeDecoder(config), source, dtype, device, working)
    return VolumeDecoder(part, config, torch.device(device).type)


def occupancy_grid(
    source: Source, config: OccupancyConfig, dtype: torch.dtype, device: str | torch.device
) -> OccupancyGrid:
    working = occupancy_bytes(config, dtype)
    part = _part(lambda: OccupancyDecoder(config), source, dtype, device, working)
    return OccupancyGrid(part, config, torch.device(device).type)


def _part(
    make: Callable[[], Net],
    source: Source,
    dtype: torch.dtype,
    device: str | torch.device,
    working: int,
) -> Part[Net]:
    """A decoder in `dtype`, loaded on first use."""
    nbytes = filled_bytes(source, dtype, 16, lambda _name, _shape: False)
    return Part(lambda: fill(make, source, dtype, device), nbytes, working)
