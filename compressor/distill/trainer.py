"""Trains the chosen blocks of a packed network on points of the original's sampling
trajectories."""

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
from vitapack.compressor.distill.trajectories import Paths
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.format.layermap import BLOCK_FIELDS
from vitapack.runtime.format.reader import torch_dtype
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.fill import replace_module
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.network import Network
from vitapack.runtime.progress import Control

Block = tuple[str, int]  # kind, original index

SAVE_SECONDS = 30.0  # between two states on the disk
WARM_UP = 20  # iterations until the learning rate is reached; then it falls linearly to 0


@dataclass(frozen=True)
class Settings:
    """Everything that a training depends on, its files aside: checked options and the sampler."""

    blocks: str
    iterations: int
    batch: int
    lr: float
    seed: int
    sampler: SamplerDefaults

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.iterations)


class Spoilt(Exception):
    """A training that led nowhere: its state is of no use."""


class Trained:
    """The student's parameters that are trained, and how they are stored."""

    def __init__(
        self, student: Network, teacher: Network, header: PackedHeader, blocks: Sequence[Block]
    ) -> None:
        """Puts trainable linears in the place of the blocks' packed ones; biases, norms and linears
        of 16 bits are trained as they are, modulation never."""
        places = tuple(f"{BLOCK_FIELDS[kind]}.{index}." for kind, index in blocks)
        self.linears: dict[str, TrainedLinear] = {}
        self.plain: dict[str, nn.Parameter] = {}  # stored in `rest`
        for name, linear in header.network.linears().items():
            if linear.role != "block" or not name.startswith(places):
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
            if name.startswith(places):
                self.plain[name] = student.get_parameter(name)
        self.rest = torch_dtype(header.rest)
        self.parameters = dict(self.plain)
        for name, module in self.linears.items():
            self.parameters |= {f"{name}.{leaf}": p for leaf, p in module.named_parameters()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def round(self) -> None:
        """Brings to the file's float dtype what is held in it: the student is then the file."""
        for name, parameter in self.parameters.items():
            if name in self.plain or name.endswith(".bias"):
                parameter.copy_(parameter.to(self.rest))

    def stored(self) -> dict[str, Tensor]:
        """By name in the packed file."""
        tensors = {name: parameter.detach() for name, parameter in self.plain.items()}
        for name, module in self.linears.items():
            tensors |= {f"{name}.{suffix}": part for suffix, part in module.stored().items()}
        return {f"model.{name}": tensor for name, tensor in tensors.items()}


class Run:
    """The training itself, and its judgement."""

    def __init__(
        self,
        student: Network,
        trained: Trained,
        seen: Paths,
        held: Paths,
        settings: Settings,
        state: State,
        device: str,
    ) -> None:
        self.student, self.trained, self.settings, self.state = student, trained, settings, state
        self.seen, self.held, self.device = seen, held, device
        self.optimizer = torch.optim.Adam(trained.parameters.values(), lr=settings.lr)

    def note(self, chosen: Sequence[Block], control: Control) -> dict[str, Any]:
        """Trains, and returns what the file will say of it. Spoilt if there is no use in it."""
        step, before = self.state.load(self.trained.parameters, self.optimizer)
        if before is None:
            before = self.judge()
        self.train(step, before, control)
        self.trained.round()
        after = self.judge()
        if not after < before:
            raise Spoilt(
                f"after {self.settings.iterations} iterations the network is no nearer to the "
                f"original (loss {after:.4g}, before {before:.4g}, on {len(self.held.files)} "
                "held-out paths): nothing was written; try a lower --lr, or more pictures and "
                "iterations"
            )
        settings = asdict(self.settings)
        return {
            "blocks": [list(block) for block in chosen],
            **{key: settings[key] for key in ("iterations", "batch", "lr", "seed", "sampler")},
            "pictures": len(self.seen.files),
            "held_out_pictures": len(self.held.files),
            "loss_before": float(f"{before:.6g}"),
            "loss_after": float(f"{after:.6g}"),
        }

    def train(self, step: int, before: float, control: Control) -> None:
        settings, saved = self.settings, time.monotonic()
        size = min(settings.batch, len(self.seen))
        while step < settings.iterations:
            control.check()
            rng = np.random.default_rng([settings.seed, step])
            loss = self.loss(self.seen, rng.choice(len(self.seen), size, replace=False).tolist())
            if not torch.isfinite(loss):
                raise Spoilt(
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

    def loss(self, paths: Paths, numbers: Sequence[int]) -> Tensor:
        """The paper's, averaged over points."""
        points = paths.read(numbers, self.device)
        embedded = self.student.config.embeds_guidance
        guidance = torch.full_like(points.t, self.settings.sampler.guidance) if embedded else None
        step = self.student.step_modulation(points.t, guidance)
        found = self.student(points.x, step, points.cond)
        errors = (found - points.with_image).square().flatten(1).mean(1)
        if points.guided.any():  # one token of zeros stands for all of them, see denoise.py
            nothing = Condition(torch.zeros_like(points.cond[:, :1]), points.cond.shape[1])
            found = self.student(points.x, step, nothing)
            without = (found - points.without).square().flatten(1).mean(1)
            errors = errors + without * points.guided
        return errors.mean()

    @torch.no_grad()
    def judge(self) -> float:
        """Mean loss over the held-out paths."""
        losses = []
        for start in range(0, len(self.held), self.settings.batch):
            some = range(start, min(start + self.settings.batch, len(self.held)))
            losses += [float(self.loss(self.held, some))] * len(some)
        return float(np.mean(losses))
