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
from vitapack.runtime import packed, sampling
from vitapack.runtime.dit import MissingTime
from vitapack.runtime.errors import UserError
from vitapack.runtime.families import BUNDLED, furniture, open_checkpoint
from vitapack.runtime.load import dit_of
from vitapack.runtime.mesh import Mesh, clean, surface_from_grid
from vitapack.runtime.trellis import Network
from vitapack.runtime.weights import is_packed

# Families whose whole way from picture to mesh is here; of the others, the network alone is.
WHOLE = {furniture.NAME: furniture}


def _family(name: str, source: str) -> Any:
    if name not in WHOLE:
        raise UserError(
            f"{source}: the image encoder of the family {name} is not supported yet; its network "
            "can be loaded (load_dit) and compressed, but not yet run from a picture"
        )
    return WHOLE[name]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise UserError(f"no device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return name


class Pipeline:
    """DiT, sampler defaults, conditioner and shape decoder of one model."""

    def __init__(
        self,
        dit: Network,
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

    @classmethod
    def open(cls, path: str | Path, device: str = "auto", compute: str = "a16") -> Pipeline:
        """A packed file, an original checkpoint (folder or file), or a bundled model's name."""
        place = Path(path)
        if str(path) not in BUNDLED and is_packed(place):
            return cls.from_packed(place, device, compute)
        return cls.from_model(path, device)

    @classmethod
    def from_packed(cls, path: str | Path, device: str = "auto", compute: str = "a16") -> Pipeline:
        """Loads a packed file; the fp16 network is never in memory."""
        header = packed.read_header(path)
        family = _family(header.family, str(path))
        dit = packed.load_packed_dit(path, device=_device(device), compute=compute)
        return cls(
            dit,
            sampling.SamplerDefaults.from_json(header.sampler),
            family.Conditioner(
                header.conditioner["config"], packed.embedded_tensors(header, "conditioner")
            ),
            family.ShapeDecoder(
                header.shape_decoder["config"], packed.embedded_tensors(header, "shape_decoder")
            ),
            family=header.family,
            source=str(path),
            sha256=header.sha256,
        )

    @classmethod
    def from_model(cls, model: str | Path, device: str = "auto") -> Pipeline:
        """Loads an original checkpoint in float32 on CPUs, fp16 elsewhere."""
        checkpoint = open_checkpoint(model)
        family = _family(checkpoint.family, str(model))
        where = _device(device)
        dtype = torch.float32 if where == "cpu" else torch.float16

        def part(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
            tensors = {
                key: checkpoint.part_tensor(name, key) for key in checkpoint.part_shapes(name)
            }
            return checkpoint.part_config(name), tensors

        return cls(
            dit_of(checkpoint, dtype=dtype, device=where),
            checkpoint.sampler,
            family.Conditioner(*part("conditioner")),
            family.ShapeDecoder(*part("shape_decoder")),
            family=checkpoint.family,
            source=str(checkpoint.path),
            sha256=checkpoint.source(hashed=True)["sha256"],
        )

    # The sampler's own times (and so the tables' rows) never depend on the picture or the seed.
    def settings(
        self, steps: int | None, guidance: float | None, sampler: str | None
    ) -> sampling.SamplerDefaults:
        """The model's defaults with what the caller asked for."""
        asked: dict[str, Any] = {"steps": steps, "guidance": guidance, "name": sampler}
        return replace(self.sampler, **{k: v for k, v in asked.items() if v is not None})

    def condition(self, image: Image.Image, name: str = "image") -> Tensor:
        """Condition tokens (1, N, D) of a picture."""
        return self.conditioner(image, name)

    def noise(self, seed: int) -> Tensor:
        """(1, L, C) float32, the same for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, *self.decoder.latent_shape), generator=generator)
        return torch.cat([noise, self.decoder.anchors[None]], dim=-1)

    @torch.inference_mode()
    def latents(
        self,
        cond: Tensor,
        noise: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        dit: Network | None = None,
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
