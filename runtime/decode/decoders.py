"""Shape decoders: turn latents into the grid of logits from which the surface is extracted.

Everything except `decoder(latents)` works before the network is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitapack.runtime.decode.grid import CHUNKS, coarse_to_fine, dense, refine_bytes
from vitapack.runtime.decode.mesh import surface_bytes
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.loading.fill import Net, fill, filled_bytes
from vitapack.runtime.loading.lazy import Lazy
from vitapack.runtime.loading.memory import large_blocks_reused
from vitapack.runtime.loading.source import Source
from vitapack.runtime.networks.cancellation import cancellable
from vitapack.runtime.progress import Control


class Decoder(ABC):
    """Third phase: latents to a cubic grid of logits over [-bounds, bounds]^3, positive inside.

    `component`: the network that the pipeline loads for its phase, None if it is in memory from the
    start. `latent_shape` has no batch dimension. `resolution`: cells per side of the grid, may be
    set; None if the network's grid is fixed. `queries`: query points of the last shape, None if the
    network's grid is fixed. `anchors` (tokens, channels): fixed positions appended to the channels
    of the DiT's input.
    """

    component: Lazy[Any] | None = None
    latent_shape: tuple[int, ...]
    bounds: float
    resolution: int | None = None
    queries: int | None = None
    anchors: Tensor | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the DiT's input: `latent_shape` with the anchors' channels appended."""
        *sides, channels = self.latent_shape
        extra = 0 if self.anchors is None else self.anchors.shape[-1]
        return (*sides, channels + extra)

    @property
    def working_bytes(self) -> int:
        """Peak memory of a call, excluding weights."""
        return 0

    @property
    def surface_bytes(self) -> int:
        """Peak memory of extracting the surface from the grid, after the network is freed."""
        return 0

    @abstractmethod
    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        """Latents (1, *latent_shape), with or without anchors, to logits (R, R, R) float32.

        Reports the phase "decode". Raises: Cancelled by the `control`.
        """


class VolumeDecoder(Decoder):
    """A ShapeVAE: latents (1, n, c) to (R + 1)^3 logits, evaluated near the surface only."""

    resolution: int
    queries: int

    def __init__(
        self, component: Lazy[ShapeDecoder], config: ShapeDecoderConfig, device: str = "cpu"
    ) -> None:
        self.component: Lazy[ShapeDecoder] = component
        self.config, self.device = config, device
        self.latent_shape = (config.latents, config.channels)
        self.bounds = config.bounds
        self.resolution = 384  # as in the published pipelines
        self.dense = False  # evaluate every node, for comparisons
        self.queries = 0

    @property
    def working_bytes(self) -> int:
        """The network's working memory; on a CPU also the grid's, always held in main memory."""
        grid = refine_bytes(self.resolution) if self.device == "cpu" else 0
        return self.component.working_bytes + grid

    @property
    def surface_bytes(self) -> int:
        return surface_bytes(self.resolution) if self.device == "cpu" else 0

    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        network = self.component()
        device = network.post_kl.weight.device
        evaluate = dense if self.dense else coarse_to_fine
        with cancellable(network, control or Control()):
            field = network.field(latents.to(device))
        with large_blocks_reused():
            grid = evaluate(field, self.resolution, self.bounds, device=device, control=control)
        self.queries = grid.queries
        return grid.values.numpy()


class OccupancyGrid(Decoder):
    """TRELLIS: latents (1, 8, 16, 16, 16) to logits at the centres of 64^3 voxels.

    One layer of empty voxels closes shapes that touch the border. TRELLIS' z points up; the grid is
    turned to y up, front +z, as in every other family.
    """

    def __init__(
        self, component: Lazy[OccupancyDecoder], config: OccupancyConfig, device: str = "cpu"
    ) -> None:
        self.component: Lazy[OccupancyDecoder] = component
        self.config, self.device = config, device
        side = config.resolution
        self.latent_shape = (config.latent_channels, side, side, side)
        self.bounds = 0.5 + 0.5 / config.side

    @property
    def working_bytes(self) -> int:
        return self.component.working_bytes

    @property
    def surface_bytes(self) -> int:
        return surface_bytes(self.config.side) if self.device == "cpu" else 0

    @torch.inference_mode()
    def __call__(self, latents: Tensor, control: Control | None = None) -> np.ndarray:
        network = self.component()
        control = control or Control()
        control.step("decode", 0, 1)
        with cancellable(network, control):
            logits = network(latents.to(network.input_layer.weight))[0, 0].float().cpu().numpy()
        control.report("decode", 1, 1)
        turned = logits.transpose(0, 2, 1)[:, :, ::-1]  # (x, y, z) to (x, z, -y)
        return np.pad(turned, 1, constant_values=min(-1.0, float(logits.min())))


def volume_decoder(
    source: Source, config: ShapeDecoderConfig, execution: Execution
) -> VolumeDecoder:
    kind = torch.device(execution.device).type
    working = config.working_bytes(CHUNKS[kind], execution.dtype)
    return VolumeDecoder(
        _lazy(lambda: ShapeDecoder(config), source, execution, working), config, kind
    )


def occupancy_grid(source: Source, config: OccupancyConfig, execution: Execution) -> OccupancyGrid:
    working = config.working_bytes(execution.dtype)
    component = _lazy(lambda: OccupancyDecoder(config), source, execution, working)
    return OccupancyGrid(component, config, torch.device(execution.device).type)


def _lazy(make: Callable[[], Net], source: Source, execution: Execution, working: int) -> Lazy[Net]:
    """A decoder that is loaded on first use."""
    nbytes = filled_bytes(source, execution.dtype)
    return Lazy(lambda: fill(make, source, execution), nbytes, working)
