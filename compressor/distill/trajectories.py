"""Records the original's sampling trajectories, which the student learns to follow.

    trajectories = Trajectories.record(pipeline, conditions, seeds, sampler, folder, batch=8, ...)
    sample = trajectories.read([3, 81, 20], "cpu")    # points by number, in any order

The sampler runs as it does for a mesh. At each time at which it evaluates the network, the latents
x and the conditional and unconditional velocities are stored in float16: 4 MB per trajectory of
Hunyuan3D-2mini at 20 steps. Evaluations that the sampler skips, because guidance would multiply
them by zero, are not made.
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
from vitapack.runtime.sampling import solvers
from vitapack.runtime.sampling.guidance import velocity_of


@dataclass(frozen=True)
class Sample:
    """A batch of points of trajectories, with the original's velocities there."""

    x: Tensor  # (B, *latents) float32
    t: Tensor  # (B,) float64
    cond: Tensor  # (B, N, D) float32
    conditional: Tensor  # velocities, shape and dtype of x
    unconditional: Tensor  # zeros if not `guided`
    guided: Tensor  # (B,) bool; False: guidance is off or embedded, so only `conditional` counts


class Trajectories:
    """Files of recorded trajectories, and of their condition tokens."""

    def __init__(
        self,
        conditions: Sequence[Path],
        files: Sequence[Path],
        sampler: SamplerDefaults,
        embedded: bool,
    ) -> None:
        """`embedded`: the network embeds its guidance and makes no unconditional pass."""
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
    ) -> Trajectories:
        """Records one trajectory per condition file, whose tokens are (1, N, D), from its seed.

        Files go into `folder`, which exists; those already there are kept. Trajectories are
        recorded in fixed batches of `batch`. `report` gets the number of finished trajectories;
        `control` cancels within a step.
        """
        pairs = zip(conditions, seeds, strict=True)
        key = hashlib.sha256(repr(sampler).encode()).hexdigest()[:8]
        files = [folder / f"path-{condition.stem}-{seed}-{key}.npy" for condition, seed in pairs]
        trajectories = cls(conditions, files, sampler, pipeline.dit.config.embeds_guidance)
        for start in range(0, len(files), batch):
            report(start)
            rows = slice(start, start + batch)
            if not all(file.exists() for file in files[rows]):
                cond = torch.cat([torch.from_numpy(np.load(path)) for path in conditions[rows]])
                noise = torch.cat([pipeline.noise(seed) for seed in seeds[rows]])
                recorded = trajectories.sample(pipeline.dit, sampler, cond, noise, control)
                for file, points in zip(files[rows], recorded, strict=True):
                    with atomic_path(file) as temporary, temporary.open("wb") as out:
                        np.save(out, points)
        report(len(files))
        return trajectories

    @torch.inference_mode()
    def sample(
        self,
        network: Network,
        sampler: SamplerDefaults,
        cond: Tensor,
        noise: Tensor,
        control: Control | None = None,
    ) -> np.ndarray:
        """Samples a batch from `noise`, (B, *latents), and returns (B, times, 3, *latents) float16:
        x, conditional and unconditional velocity at each time."""
        recorded = np.zeros((len(noise), len(self.times), 3, *noise.shape[1:]), np.float16)
        recorder = Recorder(network, {t: recorded[:, i] for i, t in enumerate(self.times)})
        velocity = velocity_of(cast(Network, recorder), sampler, cond)
        device = next(network.parameters()).device
        for _ in solvers.trajectory(velocity, noise.to(device), sampler, control):
            pass
        return recorded

    def __len__(self) -> int:
        """Number of points of all trajectories."""
        return len(self.files) * len(self.times)

    def read(self, numbers: Sequence[int], device: str) -> Sample:
        """The points with the given numbers, each below `len(self)`."""
        index = [divmod(number, len(self.times)) for number in numbers]
        stored = [np.load(self.files[row], mmap_mode="r")[time] for row, time in index]
        points = torch.from_numpy(np.stack(stored)).to(device, torch.float32)
        cond = torch.cat([torch.from_numpy(np.load(self.conditions[row])) for row, _ in index])
        return Sample(
            points[:, 0],
            torch.tensor([self.times[time] for _, time in index], dtype=torch.float64).to(device),
            cond.to(device),
            points[:, 1],
            points[:, 2],
            torch.tensor([self.guided[time] for _, time in index]).to(device),
        )


class Recorder:
    """Wraps a network for the sampler and records its inputs and outputs.

    records: by time, (B, 3, *latents), filled by each evaluation.
    """

    def __init__(self, network: Network, records: dict[float, np.ndarray]) -> None:
        self.network, self.records, self.config = network, records, network.config

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def step_modulation(self, t: Tensor, guidance: Tensor | None) -> tuple[float, StepModulation]:
        return float(t), self.network.step_modulation(t, guidance)

    def __call__(self, x: Tensor, step: tuple[float, StepModulation], cond: Condition) -> Tensor:
        t, inner = step
        velocity = self.network(x, inner, cond)
        conditional = bool(cond.tokens.any())  # all tokens of the null condition are zeros
        if conditional:
            self.records[t][:, 0] = x.float().cpu().numpy()
        self.records[t][:, 1 if conditional else 2] = velocity.float().cpu().numpy()
        return velocity
