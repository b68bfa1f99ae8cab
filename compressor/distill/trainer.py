"""Trains blocks of a packed network on points of the original's sampling trajectories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitapack.compressor.distill.state import State
from vitapack.compressor.distill.trained_linear import TrainedLinear
from vitapack.compressor.distill.trajectories import Trajectories
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.format.layermap import BLOCK_FIELDS
from vitapack.runtime.format.reader import torch_dtype
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.fill import replace_module
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.network import Network
from vitapack.runtime.progress import Control

BlockId = tuple[str, int]  # kind, original index

SAVE_SECONDS = 30.0  # between two saved states
WARM_UP = 20  # iterations until the learning rate is reached; then it falls linearly to 0


@dataclass(frozen=True)
class Settings:
    """Everything except files that a training depends on: checked options and the sampler."""

    blocks: str
    iterations: int
    batch: int
    lr: float
    seed: int
    sampler: SamplerDefaults

    def rate(self, step: int) -> float:
        """The learning rate of iteration `step`."""
        return self.lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.iterations)


class TrainingFailed(Exception):
    """Training diverged or did not improve; its saved state is discarded."""


class TrainedBlocks:
    """The trainable parameters of the student, and their tensors for the packed file."""

    def __init__(
        self, student: Network, teacher: Network, header: PackedHeader, blocks: Sequence[BlockId]
    ) -> None:
        """Replaces the packed linears of `blocks` in the student by trainable ones. Biases, norms
        and 16-bit linears are trained directly, modulation is not trained."""
        prefixes = tuple(f"{BLOCK_FIELDS[kind]}.{index}." for kind, index in blocks)
        self.linears: dict[str, TrainedLinear] = {}
        self.plain: dict[str, nn.Parameter] = {}  # stored in the header's `rest` dtype
        for name, linear in header.network.linears().items():
            if linear.role != "block" or not name.startswith(prefixes):
                continue
            module = student.get_submodule(name)
            if isinstance(module, PackedLinear):
                original = teacher.get_submodule(name).weight
                self.linears[name] = TrainedLinear(module, cast(Tensor, original))
                replace_module(student, name, self.linears[name])
            else:
                leaves = module.named_parameters()
                self.plain |= {f"{name}.{leaf}": parameter for leaf, parameter in leaves}
        for name in header.network.norms():
            if name.startswith(prefixes):
                self.plain[name] = student.get_parameter(name)
        self.rest = torch_dtype(header.rest)
        self.parameters = dict(self.plain)
        for name, module in self.linears.items():
            self.parameters |= {f"{name}.{leaf}": p for leaf, p in module.named_parameters()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the plain parameters and biases to their stored dtype; the student then equals the
        packed file."""
        for name, parameter in self.parameters.items():
            if name in self.plain or name.endswith(".bias"):
                parameter.copy_(parameter.to(self.rest))

    def stored(self) -> dict[str, Tensor]:
        """The trained tensors by name in the packed file."""
        tensors = {name: parameter.detach() for name, parameter in self.plain.items()}
        for name, module in self.linears.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.stored().items()}
        return {f"model.{name}": tensor for name, tensor in tensors.items()}


class Trainer:
    """Runs the training and evaluates it on the held-out trajectories."""

    def __init__(
        self,
        student: Network,
        trained: TrainedBlocks,
        training: Trajectories,
        held_out: Trajectories,
        settings: Settings,
        state: State,
        device: str,
    ) -> None:
        self.student, self.trained, self.settings, self.state = student, trained, settings, state
        self.training, self.held_out, self.device = training, held_out, device
        self.optimizer = torch.optim.Adam(trained.parameters.values(), lr=settings.lr)

    def note(self, chosen: Sequence[BlockId], control: Control) -> dict[str, Any]:
        """Trains, and returns the note for the packed file's header.

        Raises TrainingFailed if the loss is not finite or the held-out loss does not fall.
        """
        step, before = self.state.load(self.trained.parameters, self.optimizer)
        if before is None:
            before = self.held_out_loss()
        self.train(step, before, control)
        self.trained.round()
        after = self.held_out_loss()
        if not after < before:
            raise TrainingFailed(
                f"after {self.settings.iterations} iterations the network is no closer to the "
                f"original (loss {after:.4g}, before {before:.4g}, on {len(self.held_out.files)} "
                "held-out trajectories): nothing was written; try a lower --lr, or more images "
                "and iterations"
            )
        settings = asdict(self.settings)
        return {
            "blocks": [list(block) for block in chosen],
            **{key: settings[key] for key in ("iterations", "batch", "lr", "seed", "sampler")},
            "pictures": len(self.training.files),
            "held_out_pictures": len(self.held_out.files),
            "loss_before": float(f"{before:.6g}"),
            "loss_after": float(f"{after:.6g}"),
        }

    def train(self, step: int, before: float, control: Control) -> None:
        """Trains from iteration `step` to the last, saving the state every SAVE_SECONDS."""
        settings, saved = self.settings, time.monotonic()
        size = min(settings.batch, len(self.training))
        while step < settings.iterations:
            control.check()
            rng = np.random.default_rng([settings.seed, step])
            numbers = rng.choice(len(self.training), size, replace=False).tolist()
            loss = self.loss(self.training, numbers)
            if not torch.isfinite(loss):
                raise TrainingFailed(
                    f"the loss is {float(loss)} after {step} iterations: nothing was written; try "
                    "a lower --lr"
                )
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = settings.rate(step)
            self.optimizer.step()
            step += 1
            control.report("fine-tune", step, settings.iterations)
            if time.monotonic() - saved >= SAVE_SECONDS and step < settings.iterations:
                self.state.save(step, before, self.trained.parameters, self.optimizer)
                saved = time.monotonic()

    def loss(self, trajectories: Trajectories, numbers: Sequence[int]) -> Tensor:
        """The paper's loss, averaged over the points with the given numbers."""
        points = trajectories.read(numbers, self.device)
        embedded = self.student.config.embeds_guidance
        guidance = torch.full_like(points.t, self.settings.sampler.guidance) if embedded else None
        step = self.student.step_modulation(points.t, guidance)
        velocity = self.student(points.x, step, points.cond)
        errors = (velocity - points.conditional).square().flatten(1).mean(1)
        if points.guided.any():  # the null condition as one repeated token of zeros
            null = Condition(torch.zeros_like(points.cond[:, :1]), points.cond.shape[1])
            velocity = self.student(points.x, step, null)
            unconditional = (velocity - points.unconditional).square().flatten(1).mean(1)
            errors = errors + unconditional * points.guided
        return errors.mean()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over all points of the held-out trajectories."""
        losses = []
        count = len(self.held_out)
        for start in range(0, count, self.settings.batch):
            numbers = range(start, min(start + self.settings.batch, count))
            losses += [float(self.loss(self.held_out, numbers))] * len(numbers)
        return float(np.mean(losses))
