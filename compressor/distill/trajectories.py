"""The original's own paths from noise, recorded once for a network that is to follow them.

    paths = Paths.record(pipeline, conditions, seeds, sampler, folder, batch=8)
    sample = paths.read([3, 81, 20], "cpu")    # points by number, in any order

The sampler walks as it would for a mesh, and at every time that it asks for a velocity the point x
and the network's velocities with and without the picture are kept, in float16: 4 MB a path of
Hunyuan3D-2mini at 20 steps. What a sampler skips, because it would be multiplied by zero, is not
asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from vitapack.runtime.files import atomic_path
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times, guided_times
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import Network
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control
from vitapack.runtime.sampling import solvers as sampling
from vitapack.runtime.sampling.guidance import velocity_of


@dataclass(frozen=True)
class Sample:
    """Points of several paths and what the original makes of them."""

    x: Tensor  # (B, *latents) float32
    t: Tensor  # (B,) float64
    cond: Tensor  # (B, N, D) float32
    with_image: Tensor  # velocities as x
    without: Tensor
    guided: Tensor  # (B,) bool: is `without` a velocity, or is guidance off (embedded) there?


class Paths:
    """Files of paths and of the conditions that they belong to."""

    def __init__(
        self,
        conditions: Sequence[Path],
        files: Sequence[Path],
        sampler: SamplerDefaults,
        embedded: bool,
    ) -> None:
        """`embedded`: of a network that embeds its guidance, which has no velocity without."""
        self.conditions, self.files = conditions, files
        self.times = sorted(set(evaluation_times(sampler)), reverse=True)
        guided = None if embedded else guided_times(sampler)
        plain = embedded or sampler.guidance == 1.0
        self.guided = [not plain and (guided is None or t in guided) for t in self.times]

    @classmethod
    def record(
        cls,
        pipeline: Pipeline,
        conditions: Sequence[Path],
        seeds: Sequence[int],
        sampler: SamplerDefaults,
        folder: Path,
        batch: int,
        report: Callable[[int], None],
        control: Control | None = None,
    ) -> Paths:
        """A path of each condition file's tokens (1, N, D) from the noise of its seed, into the
        folder; what is there already stays. `batch` walk together, always the same ones. `report`
        is told how many are done; `control` cancels within a step."""
        named = zip(conditions, seeds, strict=True)
        how = hashlib.sha256(repr(sampler).encode()).hexdigest()[:8]
        files = [folder / f"path-{place.stem}-{seed}-{how}.npy" for place, seed in named]
        paths = cls(conditions, files, sampler, pipeline.dit.config.embeds_guidance)
        for start in range(0, len(files), batch):
            report(start)
            some = slice(start, start + batch)
            if not all(file.exists() for file in files[some]):
                cond = torch.cat([torch.from_numpy(np.load(place)) for place in conditions[some]])
                noise = torch.cat([pipeline.noise(seed) for seed in seeds[some]])
                walked = paths.walk(pipeline.dit, sampler, cond, noise, control)
                for file, path in zip(files[some], walked, strict=True):
                    with atomic_path(file) as part, part.open("wb") as out:
                        np.save(out, path)
        report(len(files))
        return paths

    @torch.inference_mode()
    def walk(
        self,
        network: Network,
        sampler: SamplerDefaults,
        cond: Tensor,
        noise: Tensor,
        control: Control | None = None,
    ) -> np.ndarray:
        """(B, times, 3, *latents) float16: x, velocity with the picture, without."""
        found = np.zeros((len(noise), len(self.times), 3, *noise.shape[1:]), np.float16)
        recorder = Recorder(network, {t: found[:, i] for i, t in enumerate(self.times)})
        velocity = velocity_of(cast(Network, recorder), sampler, cond)
        where = next(network.parameters()).device
        for _ in sampling.trajectory(velocity, noise.to(where), sampler, control):
            pass
        return found

    def __len__(self) -> int:
        """Points in all."""
        return len(self.files) * len(self.times)

    def read(self, numbers: Sequence[int], device: str) -> Sample:
        """Points by their number, below `len(self)`."""
        index = [divmod(number, len(self.times)) for number in numbers]
        stored = [np.load(self.files[path], mmap_mode="r")[time] for path, time in index]
        points = torch.from_numpy(np.stack(stored)).to(device, torch.float32)
        cond = torch.cat([torch.from_numpy(np.load(self.conditions[path])) for path, _ in index])
        return Sample(
            points[:, 0],
            torch.tensor([self.times[time] for _, time in index], dtype=torch.float64).to(device),
            cond.to(device),
            points[:, 1],
            points[:, 2],
            torch.tensor([self.guided[time] for _, time in index]).to(device),
        )


class Recorder:
    """Takes a network's place under the sampler and records its inputs and outputs."""

    def __init__(self, network: Network, kept: dict[float, np.ndarray]) -> None:
        self.network, self.kept, self.config = network, kept, network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def step_modulation(self, t: Tensor, guidance: Tensor | None) -> tuple[float, StepModulation]:
        return float(t), self.network.step_modulation(t, guidance)

    def __call__(self, x: Tensor, step: tuple[float, StepModulation], cond: Condition) -> Tensor:
        t, inner = step
        velocity = self.network(x, inner, cond)
        with_image = bool(cond.tokens.any())  # all tokens of the unconditional pass are zeros
        if with_image:
            self.kept[t][:, 0] = x.float().cpu().numpy()
        self.kept[t][:, 1 if with_image else 2] = velocity.float().cpu().numpy()
        return velocity
