"""Measures bytes, operations, seconds and memory of a model's denoising steps and phases.

    result = bench("model.safetensors", original="hunyuan3d-dit-v2-mini")
    print(describe(result))

First, packed network and original each run one generation, phase by phase, if image encoder and
shape decoder are available. These run before the steps, since allocator fragmentation left by other
work raises the peak (the packed 2mini's encoder took 2.9 GB instead of 2.0). Then denoising steps
of both are timed in turn on the same random latents, the original's in 16 bits and on CPUs also in
float32, each with guidance as one batch of two and in two passes (`guidance.velocity_of`). For
TRELLIS' flow of structured latents only the transformer blocks are timed, on as many tokens as its
other flow has.
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

SLAT_TOKENS = 4096  # a shape has one per surface cell at resolution 32: some thousands


@dataclass(frozen=True)
class Row:
    """A network whose steps are timed."""

    name: str
    load: Callable[[], Network]
    size: int  # bytes on disk
    loaded: int  # bytes of weights in memory
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
    """Measures a model and returns the results as JSON data. `changes` are fields of the options.

    An `original` is compared with the packed file; it is required if the file holds no shape
    decoder, for the latents' shape. `note` receives the predicted memory before each measurement;
    `control` cancels between steps. Raises UserError for unsuitable options.
    """
    options = merged(BenchOptions, options, changes)
    control = control or Control()
    file = resolve(path)
    is_file = is_packed(file)
    original, compute = options.original, options.compute
    execution = choose(options.device, compute, packed=is_file)
    device = execution.device
    if original is not None and not is_file:
        raise UserError(f"{path} is an original itself; --original needs a packed file")
    checkpoint = None if is_file else open_checkpoint(path)
    if options.cuda_graphs:
        expect_gpu(device)
    rows = []
    if is_file:
        header = read_header(file)
        checkpoint = None if original is None else original_of(header, original)
        sampler = SamplerDefaults.from_json(header.sampler)
        loaded = packed.loaded_bytes(header, execution.dtype)
        load = partial(packed.load_packed, file, execution)
        rows.append(Row(f"packed {compute}", load, header.size, loaded, sampler, execution))
    if checkpoint is not None:
        for dtype in (torch.float16,) if device != "cpu" else (torch.bfloat16, torch.float32):
            size = checkpoint.parameters() * dtype.itemsize
            load = partial(dit_of, checkpoint, dtype, device)
            plain = choose(device, dtype=dtype, packed=False)
            name = str(dtype).removeprefix("torch.")
            rows.append(Row(name, load, size, size, checkpoint.sampler, plain))
    model = header if is_file else checkpoint
    assert model is not None
    config = header.network if is_file else checkpoint.config  # type: ignore[union-attr]
    latents = _latents(config, file if is_file else None, checkpoint, device)
    tokens = options.cond_tokens or family_of(model.family, path).condition_tokens(model.variant)
    # A packed file's modulation tables serve its own step counts only.
    options = replace(options, steps=options.steps or rows[0].sampler.steps)
    lean = PipelineOptions(device, compute, original, "lean", options.cuda_graphs)
    floats = replace(lean, compute="a16", parts=None)
    generations = [(f"packed {compute}", path, lean)] if is_file else []
    if checkpoint is not None:
        generations.append(("float32" if device == "cpu" else "float16", original or path, floats))
    phases = [
        _phases(name, source, settings, options, note, control)
        for name, source, settings in (generations if options.whole_pass else ())
    ]
    reuse_large_blocks()  # the lean generations have turned it off
    steps = [step for row in rows for step in _time(row, latents, tokens, options, note, control)]
    return {
        "model": str(path),
        "variant": model.variant,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
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
                f"{file} does not hold the number of latents: give its --original"
            ) from None
        return decoder.input_shape
    raise UserError("this checkpoint holds no shape decoder, so no whole step can be timed")


def _time(
    row: Row,
    latents: tuple[int, ...],
    tokens: int,
    options: BenchOptions,
    note: Callable[[str], None],
    control: Control,
) -> list[dict[str, Any]]:
    """Loads the network, times guided steps (in two passes and as one batch, or once if guidance is
    embedded), then frees it."""
    return_memory()
    repeats, cuda_graphs = options.repeats, options.cuda_graphs
    execution, sampler = row.execution, row.sampler
    device = execution.device
    base = base_bytes(device, cuda_graphs)
    meter = PhaseMeter({}, device)
    with meter("load"):
        network = row.load()
    config = network.config
    weight = next(p for p in network.parameters() if p.is_floating_point())
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, *latents, generator=rng, dtype=torch.float32).to(weight.device)
    cond = torch.randn(1, tokens, config.cond_channels, generator=rng, dtype=torch.float32)
    guided = guided_times(sampler)
    t = next(t for t in evaluation_times(sampler) if guided is None or t in guided)
    measured = []
    for batch in (1,) if config.embeds_guidance else (1, 2):  # the larger peak last
        mode = {1: "two passes", 2: "one batch"}[batch]
        mode = ("embedded" if config.embeds_guidance else mode) + ", graphs" * cuda_graphs
        return_memory()
        working = network.step_bytes(config, execution.call(latents, tokens, batch))
        meter.predicted = {"step": base + row.loaded + working}
        note(
            f"{row.name}, guidance {mode}: {repeats + 1} steps, "
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
        measured.append(
            {
                "name": row.name,
                "bytes": row.size,
                "flops": flops.to_json(),
                "guidance": mode,
                "n": repeats,
                "median_seconds": median,
                "p90_seconds": sorted(seconds[1:])[math.ceil(0.9 * (repeats - 1))],
                "tflops_per_second": flops.total / median / 1e12,
                "load_seconds": meter.seconds["load"],
                "memory": meter.bytes["step"],
            }
        )
    return measured


def _phases(
    name: str,
    path: str | os.PathLike[str],
    settings: PipelineOptions,
    options: BenchOptions,
    note: Callable[[str], None],
    control: Control,
) -> dict[str, Any]:
    """Seconds and bytes of one lean generation by phase. "skipped" gives the reason if it cannot
    run, "stopped" the error that ended it: random weights may have no surface."""
    image = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(image).ellipse((40, 60, 216, 200), fill=(180, 120, 60, 255))
    return_memory()
    try:
        pipeline = Pipeline.open(path, settings)
        if options.resolution is not None and pipeline.decoder.resolution is not None:
            pipeline.decoder.resolution = options.resolution
        for phase, count in pipeline.predicted_bytes().items():
            steps = f", {options.steps} steps" * (phase == "denoise")
            note(f"{name}, {phase}{steps}: predicted peak {count / 2**30:.2f} GiB")
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
    """The results as text: one line per network, then one per phase."""
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
            f"{row['flops']['total'] / 1e12:7.3f} TFLOP per step  {speed}  "
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
