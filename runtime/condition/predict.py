"""Predicts the working memory of the image encoder, excluding weights."""

from __future__ import annotations

import torch

from vitapack.runtime.condition.dinov2 import Dinov2Config


def encoder_bytes(
    config: Dinov2Config, pixels: int, dtype: torch.dtype, *, expands: bool = False
) -> int:
    """One square picture through DINOv2: the MLP of a layer, with x held three times around it.

    A gated MLP's first two projections may be one or two tensors, after transformers' version.
    `expands`: a packed weight becomes floats for its product, as on GPUs.
    """
    tokens = 1 + config.registers + (pixels // config.patch) ** 2
    wide = (4 if config.swiglu else 2) * config.wide
    weight = config.hidden * config.wide if expands else 0
    return dtype.itemsize * (tokens * (3 * config.hidden + wide) + weight + 3 * pixels**2)
