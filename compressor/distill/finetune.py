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
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vitapack
from vitapack.compressor.distill.state import State
from vitapack.compressor.distill.trainer import (
    Block,
    Run,
    Settings,
    Spoilt,
    Trained,
)
from vitapack.compressor.distill.trajectories import Paths
from vitapack.compressor.options import FinetuneOptions
from vitapack.compressor.packing.compress import as_bytes
from vitapack.runtime.condition.images import load_image
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path, destination
from vitapack.runtime.format.container import file_digest, lay_out, write_container
from vitapack.runtime.format.describe import NOTE
from vitapack.runtime.format.header import FIELDS, KEY, PackedContent, PackedHeader, read_header
from vitapack.runtime.format.layermap import BLOCK_FIELDS, LayerMap
from vitapack.runtime.format.reader import TensorReader
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.packed import load_packed
from vitapack.runtime.options import merged
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.progress import Control
from vitapack.runtime.sampling.guidance import velocity_of

HELD_OUT = 8  # one picture in so many judges the result and is not trained on, at most as many


def finetune(
    model: str | Path,
    packed: str | Path,
    images: Sequence[Path],
    out: str | Path,
    options: FinetuneOptions | None = None,
    *,
    control: Control | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Writes the fine-tuned file `out` and returns what its header says of it.

    `model` is the original that `packed` was made from; images: files; `changes`: fields of the
    options. One picture in eight (at most 8; of a single picture another noise) is held out: on
    their paths the loss is measured before and after.

    A folder `out`.finetune beside `out` keeps the pictures' conditions, the original's paths and
    the state of the training while it lasts: the same call goes on after an interruption, from the
    last state that was saved (30 seconds apart), and gives the same file, bit for bit, on the same
    machine.

    Raises UserError for a packed file of another model, no pictures, nothing to train, a state of
    other settings, a loss that is no number, and where the result is no nearer to the original on
    the held-out paths; then nothing is written.
    """
    options = merged(FinetuneOptions, options, changes)
    control = control or Control()
    out = destination(out)
    header = read_header(packed)
    if out == header.path.resolve():
        raise UserError(f"{out} is the file to start from: name another one for the result")
    sampler = SamplerDefaults.from_json(header.sampler).with_values(
        steps=options.steps, guidance=options.guidance
    )
    settings = Settings(
        options.blocks, options.iterations, options.batch, options.lr, options.seed, sampler
    )
    chosen = blocks_to_train(header, options.blocks)
    if not images:
        raise UserError("no pictures to train on: give a folder with at least one")
    pipeline = Pipeline.from_model(model, options.device, memory="lean")
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
    # Plain PyTorch: the blocks that are trained need gradients, on GPUs too.
    student = load_packed(packed, Execution(pipeline.device, torch.float32))
    velocity_of(student, sampler, torch.zeros(1, 1, 1))  # MissingTime now, not after the recording
    conditions = condition_all(pipeline, images, digests, folder, control)
    trained = Trained(student, pipeline.dit, header, chosen)
    seen, held = record(pipeline, conditions, settings, folder, control)
    pipeline.free("denoise")
    run = Run(student, trained, seen, held, settings, state, pipeline.device)
    try:
        note = run.note(chosen, control)
    except Spoilt as error:
        shutil.rmtree(folder)
        raise UserError(str(error)) from None
    write(header, out, trained.stored(), note)
    shutil.rmtree(folder)
    return note


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


def condition_all(
    pipeline: Pipeline,
    images: Sequence[Path],
    digests: Sequence[str],
    folder: Path,
    control: Control,
) -> list[Path]:
    """The condition tokens of every picture, (1, N, D) in a .npy each, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for number, (path, digest) in enumerate(zip(images, digests, strict=True)):
        control.step("conditions", number, len(images))
        key = hashlib.sha256(f"{pipeline.source_sha256} {pipeline.device} {digest}".encode())
        places.append(folder / f"{key.hexdigest()[:32]}.npy")
        if not places[-1].exists():
            cond = pipeline.condition(load_image(path), str(path), control.quiet())
            with atomic_path(places[-1]) as part:
                np.save(part, cond.cpu().numpy())
    control.report("conditions", len(images), len(images))
    pipeline.free("condition")
    return places


def record(
    pipeline: Pipeline,
    conditions: Sequence[Path],
    settings: Settings,
    folder: Path,
    control: Control,
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
            lambda done: control.step("paths", (some.start or 0) + done, len(rows)),
            control.quiet(),
        )  # fmt: skip

    return part(slice(0, count)), part(slice(count, None))


def write(header: PackedHeader, out: Path, trained: dict[str, Tensor], note: dict) -> None:
    """The packed file again, with other tensors of the same dtypes and shapes, and the note."""
    layer_map = replace(header.layer_map, notes=header.layer_map.notes | {NOTE: note})
    fields = {name: getattr(header, name) for name in FIELDS}
    fields |= {"tool": f"vitapack {vitapack.__version__}", "layer_map": layer_map}
    specs = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    with TensorReader(header) as reader:
        tensors = (
            (name, as_bytes(trained[name] if name in trained else reader.read(name), dtype, name))
            for name, (dtype, _) in specs.items()
        )
        write_container(out, lay_out(specs, {KEY: PackedContent(**fields).dumps()}), tensors)
