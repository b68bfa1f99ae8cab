"""Targeted distillation: the least vital kept blocks learn to follow the original (section 3.3).

    note = finetune("furniture", "model.safetensors", pictures, "tuned.safetensors")

The ORIGINAL network walks from noise to a shape for every picture (paths.py). The trained blocks
then take optimizer steps on points of these paths, in random order, to lower

    |v_student(x, t, I) - v_teacher(x, t, I)|^2 + |v_student(x, t, 0) - v_teacher(x, t, 0)|^2

The paper takes one step at each time of a walk in turn. Mixed points of many walks are what a
gradient should be an average of: on the furniture model's automatic plan with all blocks trained,
100 steps on 32 points leave a loss of 0.20 of 0.50, 300 steps along walks of 8 left 0.29 of 0.54.
Where guidance is off or embedded the second term is left out. The trained weights are seen through
the packed file's own integers (fake_quant.py), so the result is a packed file of the same layout
and size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitapack
from vitapack.compressor.compress import as_bytes
from vitapack.compressor.fake_quant import TrainedLinear
from vitapack.compressor.paths import Paths
from vitapack.runtime import sampling
from vitapack.runtime.container import file_digest, lay_out, write_container
from vitapack.runtime.denoise import velocity_of
from vitapack.runtime.errors import UserError, atomic_path, destination
from vitapack.runtime.images import load_image
from vitapack.runtime.inspect_file import NOTE
from vitapack.runtime.layermap import BLOCK_FIELDS, LayerMap
from vitapack.runtime.linear import PackedLinear
from vitapack.runtime.modulation import MissingTime
from vitapack.runtime.packed import TensorReader, load_packed_dit, replace_module, torch_dtype
from vitapack.runtime.packed_header import FIELDS, KEY, PackedHeader, encode, read_header
from vitapack.runtime.packed_layout import network_linears, network_norms
from vitapack.runtime.pipeline import Pipeline
from vitapack.runtime.trellis import Network

Report = Callable[[int, int, str], None]  # done, total, what
Block = tuple[str, int]  # kind, original index

CHOICES = ("min-vital", "max-vital", "all")
WARM_UP = 20  # iterations until the learning rate is reached; then it falls linearly to 0
HELD_OUT = 8  # one picture in so many judges the result and is not trained on, at most as many
SAVE_SECONDS = 30.0  # between two states on the disk


@dataclass(frozen=True)
class Settings:
    """What a run depends on, beside its files."""

    blocks: str
    iterations: int
    batch: int
    lr: float
    seed: int
    sampler: sampling.SamplerDefaults

    def __post_init__(self) -> None:
        if self.blocks not in CHOICES:
            raise UserError(f"no blocks {self.blocks!r}: choose one of {', '.join(CHOICES)}")
        if self.iterations < 1 or self.batch < 1:
            raise UserError("iterations and batch must be at least 1")
        if not 0 < self.lr < 1:
            raise UserError(f"learning rate {self.lr}: expected a number between 0 and 1")

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.iterations)


def finetune(
    model: str | Path,
    packed: str | Path,
    images: Sequence[Path],
    out: str | Path,
    *,
    blocks: str = "min-vital",
    iterations: int = 1000,
    batch: int = 16,
    lr: float = 3e-4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "cpu",
    progress: Report | None = None,
) -> dict[str, Any]:
    """Writes the fine-tuned file `out` and returns what its header says of it.

    `model` is the original that `packed` was made from; images: files. blocks: of each kind the
    least or most vital kept one, or all of them. `batch`: points of a step, and pictures that the
    original walks with at a time. steps, guidance: of the walks; default: the packed file's, whose
    modulation tables must serve them. One picture in eight (at most 8; of a single picture another
    noise) is held out: on their paths the loss is measured before and after.

    A folder `out`.finetune beside `out` keeps the pictures' conditions, the original's paths and
    the state of the training while it lasts: the same call goes on after an interruption, from the
    last state that was saved (30 seconds apart), and gives the same file, bit for bit, on the same
    machine.

    Raises UserError for a packed file of another model, no pictures, nothing to train, a state of
    other settings, a loss that is no number, and where the result is no nearer to the original on
    the held-out paths; then nothing is written.
    """
    report = progress or (lambda done, total, what: None)
    out = destination(out)
    header = read_header(packed)
    if out == header.path.resolve():
        raise UserError(f"{out} is the file to start from: name another one for the result")
    sampler = sampling.SamplerDefaults.from_json(header.sampler)
    asked: dict[str, Any] = {"steps": steps, "guidance": guidance}
    sampler = replace(sampler, **{key: value for key, value in asked.items() if value is not None})
    settings = Settings(blocks, iterations, batch, lr, seed, sampler)
    chosen = blocks_to_train(header, blocks)
    if not images:
        raise UserError("no pictures to train on: give a folder with at least one")
    pipeline = Pipeline.from_model(model, device, memory="lean")
    if pipeline.source_sha256 != header.source["sha256"]:
        raise UserError(
            f"{packed} was not made from {model}: its source is {header.source['name']} with "
            f"sha256 {header.source['sha256'][:16]}..., this has {pipeline.source_sha256[:16]}..."
        )
    digests = [file_digest(path) for path in images]
    identity = {
        "model": pipeline.source_sha256,
        "packed": header.sha256,
        "pictures": digests,
        "device": pipeline.device,
        **asdict(settings),
    }
    folder = out.with_name(f"{out.name}.finetune")
    state = State(folder / "state.safetensors", identity)
    student = load_packed_dit(packed, dtype=torch.float32).to(pipeline.device)
    try:
        velocity_of(student, sampler, torch.zeros(1, 1, 1))  # which looks all times up
    except MissingTime as error:
        raise UserError(f"{packed}: {error}") from None
    conditions = condition_all(pipeline, images, digests, folder, report)
    trained = Trained(student, pipeline.dit, header, chosen)
    seen, held = record(pipeline, conditions, settings, folder, report)
    pipeline.free("denoise")
    run = Run(student, trained, seen, held, settings, state, pipeline.device)
    try:
        note = run.note(chosen, report)
    except Spoilt as error:
        shutil.rmtree(folder)
        raise UserError(str(error)) from None
    write(header, out, trained.stored(), note)
    shutil.rmtree(folder)
    return note


class Spoilt(Exception):
    """A training that led nowhere: its state is of no use."""


def blocks_to_train(header: PackedHeader, choice: str) -> list[Block]:
    """Of each kind the kept block of least or most vitality, or every kept block. UserError."""
    layer_map: LayerMap = header.layer_map
    found = []
    for kind in BLOCK_FIELDS:
        kept = [block for block in layer_map.blocks if block.kind == kind]
        if choice == "all":
            found += kept
        elif kept:
            if any(block.vitality is None for block in kept):
                raise UserError(
                    f"{header.path}: its layer map ({layer_map.how}) states no vitality; compress "
                    "with a plan made from `vitapack analyze`, or train with --blocks all"
                )
            pick = min if choice == "min-vital" else max
            found.append(pick(kept, key=lambda block: (block.vitality, block.index)))
    if not found:
        raise UserError(f"{header.path} keeps no blocks: nothing to train")
    return [(block.kind, block.index) for block in found]


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
        for name, linear in network_linears(header.network).items():
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
        for name in network_norms(header.network):
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

    def note(self, chosen: Sequence[Block], report: Report) -> dict[str, Any]:
        """Trains, and returns what the file will say of it. Spoilt if there is no use in it."""
        step, before = self.state.load(self.trained.parameters, self.optimizer)
        if before is None:
            before = self.judge()
        self.train(step, before, report)
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

    def train(self, step: int, before: float, report: Report) -> None:
        settings, saved = self.settings, time.monotonic()
        size = min(settings.batch, len(self.seen))
        while step < settings.iterations:
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
            report(step, settings.iterations, "fine-tune")
            if time.monotonic() - saved >= SAVE_SECONDS and step < settings.iterations:
                self.state.save(step, before, self.trained.parameters, self.optimizer)
                saved = time.monotonic()

    def loss(self, paths: Paths, numbers: Sequence[int]) -> Tensor:
        """The paper's, averaged over points."""
        points = paths.read(numbers, self.device)
        embedded = self.student.config.guidance_embed
        guidance = torch.full_like(points.t, self.settings.sampler.guidance) if embedded else None
        when = self.student.when(points.t, guidance)
        found = self.student(points.x, when, points.cond)
        errors = (found - points.with_image).square().flatten(1).mean(1)
        if points.guided.any():  # one token of zeros stands for all of them, see denoise.py
            nothing, repeats = torch.zeros_like(points.cond[:, :1]), points.cond.shape[1]
            found = self.student(points.x, when, nothing, None, repeats)
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


def condition_all(
    pipeline: Pipeline,
    images: Sequence[Path],
    digests: Sequence[str],
    folder: Path,
    report: Report,
) -> list[Path]:
    """The condition tokens of every picture, (1, N, D) in a .npy each, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for number, (path, digest) in enumerate(zip(images, digests, strict=True)):
        report(number, len(images), "conditions")
        key = hashlib.sha256(f"{pipeline.source_sha256} {pipeline.device} {digest}".encode())
        places.append(folder / f"{key.hexdigest()[:32]}.npy")
        if not places[-1].exists():
            cond = pipeline.condition(load_image(path), str(path))
            with atomic_path(places[-1]) as part:
                np.save(part, cond.cpu().numpy())
    report(len(images), len(images), "conditions")
    pipeline.free("condition")
    return places


def record(
    pipeline: Pipeline,
    conditions: Sequence[Path],
    settings: Settings,
    folder: Path,
    report: Report,
) -> tuple[Paths, Paths]:
    """The original's paths to train on, and those held out: of other pictures, or, where there is
    only one, from another noise."""
    last = min(HELD_OUT, -(-len(conditions) // HELD_OUT)) if len(conditions) > 1 else 0
    rows = [*conditions, *conditions[:1]] if not last else list(conditions)
    count = len(conditions) - last
    seeds = [
        int(seed) for seed in np.random.default_rng(settings.seed).integers(2**31, size=len(rows))
    ]

    def part(some: slice) -> Paths:
        return Paths.record(
            pipeline, rows[some], seeds[some], settings.sampler, folder, settings.batch,
            lambda done: report((some.start or 0) + done, len(rows), "paths"),
        )  # fmt: skip

    return part(slice(0, count)), part(slice(count, None))


class State:
    """The training after a step, on the disk: parameters, Adam's moments, the step."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """UserError where the file there belongs to other settings."""
        self.path, self.identity = path, json.dumps(identity, sort_keys=True)
        self.header: dict[str, str] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                self.header = file.metadata() or {}
            if self.header.get("identity") != self.identity:
                raise UserError(
                    f"{path} belongs to a training with other files or settings: go on with "
                    f"those, delete {path.parent}, or name another output file"
                )

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float | None]:
        """Fills both; returns the step and the loss before the training (0 and None: no state)."""
        if not self.header:
            return 0, None
        step, tensors = int(self.header["step"]), load_file(self.path)
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
            moments = {key: tensors[f"{key} {name}"] for key in ("exp_avg", "exp_avg_sq")}
            moments = {key: tensor.to(parameter.device) for key, tensor in moments.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step, float(self.header["before"])

    def save(
        self,
        step: int,
        before: float,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key} {name}"] = optimizer.state[parameter][key]
        metadata = {"identity": self.identity, "step": str(step), "before": str(before)}
        with atomic_path(self.path) as part:
            save_file(tensors, part, metadata)


def write(header: PackedHeader, out: Path, trained: dict[str, Tensor], note: dict) -> None:
    """The packed file again, with other tensors of the same dtypes and shapes, and the note."""
    layer_map = replace(header.layer_map, notes=header.layer_map.notes | {NOTE: note})
    fields = {name: getattr(header, name) for name in FIELDS}
    fields |= {"tool": f"vitapack {vitapack.__version__}", "layer_map": layer_map}
    specs = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    with TensorReader(header, "cpu") as reader:
        tensors = (
            (name, as_bytes(trained[name] if name in trained else reader.read(name), dtype, name))
            for name, (dtype, _) in specs.items()
        )
        write_container(out, lay_out(specs, {KEY: encode(**fields)}), tensors)
