"""Fine-tuning: trains the least vital kept blocks to follow the original (paper, section 3.3).

    note = finetune("furniture", "model.safetensors", images, "tuned.safetensors")

The original network's sampling trajectory is recorded for every image (trajectories.py). The
trained blocks then take optimizer steps on points of these trajectories, in random order, to lower

    |v_student(x, t, I) - v_teacher(x, t, I)|^2 + |v_student(x, t, 0) - v_teacher(x, t, 0)|^2

The paper takes one optimizer step at each time of a trajectory in turn. Gradients averaged over
points of many trajectories train better: on the furniture model's automatic plan with all blocks
trained, 100 steps on 32 points reduce the loss from 0.50 to 0.20, 300 steps along trajectories in
batches of 8 from 0.54 to 0.29. The second term is omitted if guidance is off or embedded. The
trained weights are rounded to the packed file's grid in every forward pass (trained_linear.py), so
the result is a packed file of the same layout and size.
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
    BlockId,
    Settings,
    TrainedBlocks,
    Trainer,
    TrainingFailed,
)
from vitapack.compressor.distill.trajectories import Trajectories
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

HELD_OUT = 8  # one image in 8 is held out, 8 at most


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
    """Fine-tunes `packed` into the file `out` and returns the note that its header gets.

    model: the original that `packed` was made from. images: files. changes: fields of the options.
    One image in eight is held out, 8 at most (with a single image, a second seed of it): the loss
    on the held-out trajectories is measured before and after.

    The folder `out`.finetune, next to `out`, holds condition tokens, trajectories and the training
    state until training ends. After an interruption the same call continues from the last saved
    state (one every 30 seconds) and writes the same file, bit for bit, on the same machine.

    Raises UserError if `packed` was made from another model, if there are no images or no blocks to
    train, if a saved state has other settings, if the loss is not finite, or if the result is no
    closer to the original on the held-out trajectories. Nothing is written then.
    """
    options = merged(FinetuneOptions, options, changes)
    control = control or Control()
    out = destination(out)
    header = read_header(packed)
    if out == header.path.resolve():
        raise UserError(f"{out} is the packed file to fine-tune: name another one for the result")
    sampler = SamplerDefaults.from_json(header.sampler).with_values(
        steps=options.steps, guidance=options.guidance
    )
    settings = Settings(
        options.blocks, options.iterations, options.batch, options.lr, options.seed, sampler
    )
    chosen = blocks_to_train(header, options.blocks)
    if not images:
        raise UserError("no images to train on: give a folder with at least one")
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
    # The plain path on GPUs too: trained blocks need gradients.
    student = load_packed(packed, Execution(pipeline.device, torch.float32))
    velocity_of(student, sampler, torch.zeros(1, 1, 1))  # a missing table fails before recording
    conditions = condition_all(pipeline, images, digests, folder, control)
    trained = TrainedBlocks(student, pipeline.dit, header, chosen)
    training, held_out = record(pipeline, conditions, settings, folder, control)
    pipeline.free("denoise")
    trainer = Trainer(student, trained, training, held_out, settings, state, pipeline.device)
    try:
        note = trainer.note(chosen, control)
    except TrainingFailed as error:
        shutil.rmtree(folder)
        raise UserError(str(error)) from None
    write(header, out, trained.stored(), note)
    shutil.rmtree(folder)
    return note


def blocks_to_train(header: PackedHeader, choice: str) -> list[BlockId]:
    """The least ("min-vital") or most ("max-vital") vital kept block of each kind, or "all".

    Raises UserError if the layer map keeps no blocks, or lacks the vitality that `choice` needs.
    """
    layer_map: LayerMap = header.layer_map
    chosen = []
    for kind in BLOCK_FIELDS:
        kept = [block for block in layer_map.blocks if block.kind == kind]
        if choice == "all":
            chosen += kept
        elif kept:
            if any(block.vitality is None for block in kept):
                raise UserError(
                    f"{header.path}: its layer map ({layer_map.how}) states no vitality; compress "
                    "with a plan made from `vitapack analyze`, or train with --blocks all"
                )
            pick = min if choice == "min-vital" else max
            chosen.append(pick(kept, key=lambda block: (block.vitality, block.index)))
    if not chosen:
        raise UserError(f"{header.path} keeps no blocks: nothing to train")
    return [(block.kind, block.index) for block in chosen]


def condition_all(
    pipeline: Pipeline,
    images: Sequence[Path],
    digests: Sequence[str],
    folder: Path,
    control: Control,
) -> list[Path]:
    """Files of the condition tokens of every image, (1, N, D), computed only if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (path, digest) in enumerate(zip(images, digests, strict=True)):
        control.step("conditions", number, len(images))
        key = hashlib.sha256(f"{pipeline.source_sha256} {pipeline.device} {digest}".encode())
        files.append(folder / f"{key.hexdigest()[:32]}.npy")
        if not files[-1].exists():
            cond = pipeline.condition(load_image(path), str(path), control.quiet())
            with atomic_path(files[-1]) as temporary:
                np.save(temporary, cond.cpu().numpy())
    control.report("conditions", len(images), len(images))
    pipeline.free("condition")
    return files


def record(
    pipeline: Pipeline,
    conditions: Sequence[Path],
    settings: Settings,
    folder: Path,
    control: Control,
) -> tuple[Trajectories, Trajectories]:
    """Records the trajectories to train on and the held-out ones, which are of other images (with a
    single image, of another seed)."""
    held_out = min(HELD_OUT, -(-len(conditions) // HELD_OUT)) if len(conditions) > 1 else 0
    files = list(conditions) if held_out else [*conditions, *conditions[:1]]
    count = len(conditions) - held_out
    seeds = [
        int(seed) for seed in np.random.default_rng(settings.seed).integers(2**31, size=len(files))
    ]

    def recorded(rows: slice) -> Trajectories:
        return Trajectories.record(
            pipeline, files[rows], seeds[rows], settings.sampler, folder, settings.batch,
            lambda done: control.step("trajectories", (rows.start or 0) + done, len(files)),
            control.quiet(),
        )  # fmt: skip

    return recorded(slice(0, count)), recorded(slice(count, None))


def write(header: PackedHeader, out: Path, trained: dict[str, Tensor], note: dict) -> None:
    """Writes the packed file to `out` with the trained tensors, whose dtypes and shapes are the
    same, and with `note` in the header."""
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
