"""The one place where all meet: a picture becomes a mesh.

    pipeline = Pipeline.from_packed("model.safetensors")
    mesh = pipeline(Image.open("chair.png"), seed=0)

Phases: condition (image encoder), denoise (DiT under a sampler), decode (shape decoder, marching
cubes). Pictures are taken one at a time with noise of their own seed, so a mesh never depends on
what else was in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vitapack
from vitapack.runtime import sampling
from vitapack.runtime.dit import DiT, MissingTime
from vitapack.runtime.errors import UserError
from vitapack.runtime.mesh import Mesh, clean, surface_from_grid


class Pipeline:
    """DiT, sampler defaults, conditioner and shape decoder of one model."""

    def __init__(
        self,
        dit: DiT,
        sampler: sampling.SamplerDefaults,
        conditioner: Callable[..., Tensor],
        decoder: Any,
        *,
        family: str,
        source: str,
        sha256: str,
    ) -> None:
        self.dit, self.sampler = dit, sampler
        self.conditioner, self.decoder = conditioner, decoder
        self.family, self.source, self.source_sha256 = family, source, sha256
        self.seconds: dict[str, float] = {}  # of the last call, by phase

    # The sampler's own times (and so the tables' rows) never depend on the picture or the seed.
    def settings(
        self, steps: int | None, guidance: float | None, sampler: str | None
    ) -> sampling.SamplerDefaults:
        """The model's defaults with what the caller asked for."""
        asked = {"steps": steps, "guidance": guidance, "name": sampler}
        return replace(self.sampler, **{k: v for k, v in asked.items() if v is not None})

    def condition(self, image: Image.Image, name: str = "image") -> Tensor:
        """Condition tokens (1, N, D) of a picture."""
        return self.conditioner(image, name)

    def noise(self, seed: int) -> Tensor:
        """(1, L, C) float32, the same for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((1, *self.decoder.latent_shape), generator=generator)

    @torch.inference_mode()
    def latents(
        self,
        cond: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        dit: DiT | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents (1, L, C) float32 on the CPU; `dit` stands in for the model's own network, such
        as one with a block left out."""
        settings = self.settings(steps, guidance, sampler)
        network = self.dit if dit is None else dit
        where = network.latent_in.weight
        cond = cond.to(where)
        embedded = torch.tensor([settings.guidance], device=where.device)

        def call(x: Tensor, t: float, tokens: Tensor) -> Tensor:
            # float64, so that a time finds its own row of the modulation tables.
            when = torch.tensor([t], dtype=torch.float64, device=where.device)
            if network.config.guidance_embed:
                return network(x.to(where.dtype), when, tokens, embedded).float()
            return network(x.to(where.dtype), when, tokens).float()

        velocity = sampling.classifier_free(
            call,
            cond,
            torch.zeros_like(cond),
            1.0 if network.config.guidance_embed else settings.guidance,
            only_at=sampling.guided_times(settings),
        )
        try:
            out = sampling.sample(velocity, noise.to(where.device), settings, progress)
        except MissingTime as error:
            raise UserError(str(error)) from None
        if not torch.isfinite(out).all():
            raise UserError(
                f"{self.source}: the network gave NaN or infinite values; the file is damaged, or "
                "its dtype too narrow (try --device cpu)"
            )
        return out.float().cpu()

    def grid(self, latents: Tensor) -> np.ndarray:
        """Logits (R, R, R) float32, positive inside."""
        return self.decoder(latents)

    def surface(self, grid: np.ndarray) -> Mesh:
        """The cleaned zero level of a grid; UserError if there is none."""
        return clean(surface_from_grid(grid, self.decoder.bounds))

    def __call__(
        self,
        image: Image.Image,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        name: str = "image",
        progress: Callable[[int, int], None] | None = None,
    ) -> Mesh:
        """A mesh whose metadata says how it was made. Raises UserError for a picture without an
        object, for a step count that the packed file has no tables for, for an empty shape."""
        settings = self.settings(steps, guidance, sampler)
        start = time.perf_counter()
        cond = self.condition(image, name)
        conditioned = time.perf_counter()
        latents = self.latents(
            cond,
            self.noise(seed),
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            progress=progress,
        )
        denoised = time.perf_counter()
        mesh = self.surface(self.grid(latents))
        self.seconds = {
            "condition": conditioned - start,
            "denoise": denoised - conditioned,
            "decode": time.perf_counter() - denoised,
        }
        metadata = {
            "generator": f"vitapack {vitapack.__version__}",
            "family": self.family,
            "model": Path(self.source).name,
            "sha256": self.source_sha256,
            "seed": seed,
            "sampler": settings.name,
            "steps": settings.steps,
            "guidance": settings.guidance,
        }
        return replace(mesh, metadata=metadata)
