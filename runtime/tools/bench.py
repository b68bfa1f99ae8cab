"""What a model takes on this machine: bytes, operations, seconds and memory of a denoising step.

    result = bench("model.safetensors", original="hunyuan3d-dit-v2-mini")
    print(describe(result))

The packed network and the original each make one picture into a mesh, phase by phase, where the
image encoder and the shape decoder are at hand: first, since a process takes more among the holes
that other work has left (the packed 2mini's encoder 2.9 GB instead of 2.0). Then steps of both, the
original's in 16 bits and on CPUs also in float32, are timed in the same run, one after the other,
on the same random latents, each with guidance as one batch of two and in two passes
(`denoise.velocity_of`). Of TRELLIS' flow of structured latents the transformer blocks are timed, on
as many tokens as its other flow has.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from vitapack.runtime.engines.choose import Execution, choose
from vitapack.runtime.engines.cuda_graph import GraphedNetwork, expect_gpu
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.families.open import family_of, open_checkpoint, resolve
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times, guided_times
from vitapack.runtime.loading import packed
from vitapack.runtime.loading.checkpoint_files import is_packed
from vitapack.runtime.loading.memory import return_memory, reuse_large_blocks
from vitapack.runtime.networks.network import Network
from vitapack.runtime.options import BenchOptions, PipelineOptions, merged
from vitapack.runtime.pipeline.load import dit_of, original_of
from vitapack.runtime.pipeline.phases import PhaseMeter, memory_words
from vitapack.runtime.pipeline.pipeline import Pipeline
from vitapack.runtime.pipeline.predict import base_bytes
from vitapack.runtime.progress import Control
from vitapack.runtime.sampling.guidance import velocity_of
from vitapack.runtime.tools.flops import guided_flops

SLAT_TOKENS = 4096  # a shape's are its surface's cells at 32 a side: some thousands


@dataclass(frozen=True)
class Row:
    """A network whose steps are timed."""

    name: str
    load: Callable[[], Network]
    size: int  # bytes on disk
    held: int  # bytes of weights in memory
    sampler: SamplerDefaults
    execution: Execution


def bench(
    path: str | os.PathLike[str],
    options: BenchOptions | None = None,
    *,
    note: Callable[[str], None] = lambda line: None,
    control: Control | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """JSON of everything measured. `changes` are fields of the options.

    The original of a packed file is compared with it, and needed for the latents' sizes if the file
    holds no shape decoder. `note` is told the predicted memory before each part runs; `control`
    cancels between the steps. UserError.
    """
    options = merged(BenchOptions, options, changes)
    control = control or Control()
    place = resolve(path)
    is_file = is_packed(place)
    original, compute = options.original, options.compute
    execution = choose(options.device, compute, packed=is_file)
    where = execution.device
    if original is not None and not is_file:
        raise UserError(f"{path} is an original itself; --original goes with a packed file")
    checkpoint = None if is_file else open_checkpoint(path)
    if options.cuda_graphs:
        expect_gpu(where)
    rows = []
    if is_file:
        header = read_header(place)
        checkpoint = None if original is None else original_of(header, original)
        sampler = SamplerDefaults.from_json(header.sampler)
        held = packed.loaded_bytes(header, execution.dtype)
        load = partial(packed.load_packed, place, execution)
        rows.append(Row(f"packed {compute}", load, header.size, held, sampler, execution))
    if checkpoint is not None:
        for dtype in (torch.float16,) if where != "cpu" else (torch.bfloat16, torch.float32):
            size = checkpoint.parameters() * dtype.itemsize
            load = partial(dit_of, checkpoint, dtype, where)
            plain = choose(where, dtype=dtype, packed=False)
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(name, load, size, size, checkpoint.sampler, plain))
    model = header if is_file else checkpoint
    assert model is not None
    config = header.network if is_file else checkpoint.config  # type: ignore[union-attr]
    latents = _latents(config, place if is_file else None, checkpoint, where)
    tokens = options.cond_tokens or family_of(model.family, path).condition_tokens(model.variant)
    # The tables of a packed file serve no other count than its own.
    options = replace(options, steps=options.steps or rows[0].sampler.steps)
    lean = PipelineOptions(where, compute, original, "lean", options.cuda_graphs)
    floats = replace(lean, compute="a16", parts=None)
    passes = [(f"packed {compute}", path, lean)] if is_file else []
    if checkpoint is not None:
        passes.append(("float32" if where == "cpu" else "float16", original or path, floats))
    phases = [
        _phases(name, source, how, options, note, control)
        for name, source, how in (passes if options.whole_pass else ())
    ]
    reuse_large_blocks()  # the lean generations have turned it off
    steps = [found for row in rows for found in _time(row, latents, tokens, options, note, control)]
    return {
        "model": str(path),
        "variant": model.variant,
        "device": torch.cuda.get_device_name(where) if where != "cpu" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "latents": list(latents),
        "cond_tokens": tokens,
        "steps": steps,
        "phases": phases,
    }


def _latents(
    config: Architecture, file: Path | None, checkpoint: Checkpoint | None, device: str
) -> tuple[int, ...]:
    if not config.has_edges:
        return SLAT_TOKENS, config.hidden
    if checkpoint is not None and checkpoint.latents is not None:
        return checkpoint.latents
    if file is not None:
        try:
            decoder = Pipeline.from_packed(file, device).decoder
        except UserError:
            raise UserError(
                f"{file} does not say how many latents it is for: give its --original"
            ) from None
        return decoder.input_shape
    raise UserError("this checkpoint holds no shape decoder, so it runs no whole step")


def _time(
    row: Row,
    latents: tuple[int, ...],
    tokens: int,
    options: BenchOptions,
    note: Callable[[str], None],
    control: Control,
) -> list[dict[str, Any]]:
    """Loads, times guided steps in either way (one where guidance is an embedding), lets go."""
    return_memory()
    repeats, cuda_graphs = options.repeats, options.cuda_graphs
    execution, sampler = row.execution, row.sampler
    device = execution.device
    base = base_bytes(device, cuda_graphs)
    meter = PhaseMeter({}, device)
    with meter("load"):
        network = row.load()
    config = network.config
    place = next(p for p in network.parameters() if p.is_floating_point())
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, *latents, generator=rng, dtype=torch.float32).to(place.device)
    cond = torch.randn(1, tokens, config.cond_channels, generator=rng, dtype=torch.float32)
    guided = guided_times(sampler)
    t = next(t for t in evaluation_times(sampler) if guided is None or t in guided)
    found = []
    for batch in (1,) if config.embeds_guidance else (1, 2):  # the larger peak comes last
        how = {1: "two passes", 2: "one batch"}[batch]
        how = ("embedded" if config.embeds_guidance else how) + ", graphs" * cuda_graphs
        return_memory()
        working = network.step_bytes(config, execution.call(latents, tokens, batch))
        meter.predicted = {"step": base + row.held + working}
        note(
            f"{row.name}, guidance {how}: {repeats + 1} steps, "
            f"predicted peak {meter.predicted['step'] / 2**30:.2f} GiB"
        )
        stepper = GraphedNetwork(network) if cuda_graphs else network
        velocity = velocity_of(stepper, sampler, cond, one_batch=batch == 2)
        seconds = []
        with meter("step"), torch.inference_mode():
            for _ in range(repeats + 1):  # the first warms up
                control.check()
                start = time.perf_counter()
                velocity(x, t)
                if device != "cpu":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        flops = guided_flops(config, latents, tokens, batch == 2)
        median = statistics.median(seconds[1:])
        found.append(
            {
                "name": row.name,
                "bytes": row.size,
                "flops": flops.to_json(),
                "guidance": how,
                "n": repeats,
                "median_seconds": median,
                "p90_seconds": sorted(seconds[1:])[math.ceil(0.9 * (repeats - 1))],
                "tflops_per_second": flops.total / median / 1e12,
                "load_seconds": meter.seconds["load"],
                "memory": meter.bytes["step"],
            }
        )
    return found


def _phases(
    name: str,
    path: str | os.PathLike[str],
    how: PipelineOptions,
    options: BenchOptions,
    note: Callable[[str], None],
    control: Control,
) -> dict[str, Any]:
    """Seconds and bytes of one picture to mesh, lean; says what was missing if it cannot be, or
    where it stopped: random weights may have no surface."""
    image = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(image).ellipse((40, 60, 216, 200), fill=(180, 120, 60, 255))
    return_memory()
    try:
        pipeline = Pipeline.open(path, how)
        if options.resolution is not None and pipeline.decoder.resolution is not None:
            pipeline.decoder.resolution = options.resolution
        for phase, count in pipeline.predicted_bytes().items():
            often = f", {options.steps} steps" * (phase == "denoise")
            note(f"{name}, {phase}{often}: predicted peak {count / 2**30:.2f} GiB")
    except UserError as error:
        return {"name": name, "skipped": str(error)}
    stopped = None
    try:
        pipeline(image, steps=options.steps, control=control)
    except UserError as error:
        stopped = str(error)
    return {
        "name": name,
        "stopped": stopped,
        "seconds": pipeline.seconds,
        "bytes": pipeline.bytes,
        "steps": options.steps,
        "resolution": pipeline.decoder.resolution,
        "queries": pipeline.decoder.queries,
    }


def describe(result: dict[str, Any]) -> str:
    """For people: one line a network, then the phases."""
    lines = [
        f"{result['variant']} on {result['device']}, {result['threads']} threads, "
        f"latents {result['latents']}, {result['cond_tokens']} condition tokens"
    ]
    base = result["steps"][0]["median_seconds"]
    for row in result["steps"]:
        memory = memory_words(row["memory"])
        speed = f"{row['median_seconds']:.3f} s (n={row['n']}, {row['median_seconds'] / base:.2f}x)"
        lines.append(
            f"{row['name'] + ', ' + row['guidance']:24} {row['bytes'] / 2**30:7.3f} GiB  "
            f"{row['flops']['total'] / 1e12:7.3f} TFLOP a step  {speed}  "
            f"{row['tflops_per_second']:.3f} TFLOP/s{memory}"
        )
    for phases in result["phases"]:
        name = phases["name"]
        if "skipped" in phases:
            lines.append(f"{name}: phases not timed: {phases['skipped']}")
            continue
        for phase, seconds in phases["seconds"].items():
            memory = memory_words(phases["bytes"][phase])
            lines.append(f"{name + ', ' + phase:24} {seconds:8.2f} s{memory}")
        if phases["stopped"]:
            lines.append(f"{name}: stopped: {phases['stopped']}")
    return "\n".join(lines)
