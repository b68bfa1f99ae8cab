"""Predicts the working memory of the shape decoders, their grid and the surface extraction."""

from __future__ import annotations

import torch

from vitapack.runtime.decode.occupancy import OccupancyConfig
from vitapack.runtime.decode.shape_vae import ShapeDecoderConfig


def volume_bytes(config: ShapeDecoderConfig, chunk: int, dtype: torch.dtype) -> int:
    """The shape decoder: its transformer on all latents, or its cross-attention on one chunk."""
    width, geo = config.width, config.geo_width
    tokens = config.latents * (3 + 2 * 4) * width
    point = (3 + 2 * config.geo_mlp_expand) * geo + 3 + 6 * config.num_freqs
    asked = chunk * point + 2 * config.latents * geo
    return dtype.itemsize * max(tokens, asked)


def refine_bytes(resolution: int) -> int:
    """A grid's values, their interpolation and masks: 10 bytes a node; and what is made around the
    surface of an object that fills the cube: 2000 R^2, at most 100 MB since it is made in parts
    (measured from R = 96 to 384)."""
    return 10 * (resolution + 1) ** 3 + min(2000 * resolution**2, 100_000_000)


def surface_bytes(resolution: int) -> int:
    """Marching cubes on two or three grids, or the mesh of 6 R^2 faces as it is cleaned."""
    nodes = (resolution + 3) ** 3
    return max(9 * nodes, 4 * nodes + 2200 * resolution**2)


def occupancy_bytes(config: OccupancyConfig, dtype: torch.dtype) -> int:
    """TRELLIS' convolutions: four times the largest level, and its channels-last normalisation."""
    levels = enumerate(config.channels)
    largest = max(channels * (config.resolution * 2**level) ** 3 for level, channels in levels)
    return int(4.25 * largest) * dtype.itemsize
