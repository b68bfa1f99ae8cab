"""Times a guided denoising step of Hunyuan3D-2mini, which a user waits for, not one forward pass.

Reference implementations evaluate the network on a batch of two with all condition tokens. vitapack
runs the unconditional half as a separate pass on one token (`runtime/sampling/guidance.py`); a
further row does the same with torch's bf16.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.mini import inputs, prepare
from benchmarks.markdown import table
from benchmarks.timing import all_times
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.pipeline.load import load_dit
from vitapack.runtime.sampling.guidance import velocity_of

ROWS = {
    "bf16": "torch bf16, one batch of two",
    "bf16, two passes": "torch bf16, two passes",
    "w8a8": "W8A8, two passes",
    "w4a8": "W4A8, two passes",
}


def measure(work: Path, latents: int, rounds: int) -> dict[str, Any]:
    """Interleaved seconds of each row, and its relative error to float32 in two passes."""
    model = prepare(work)
    x, _, cond = (part[:1] for part in inputs(latents))
    sampler = SamplerDefaults("euler", 5, 5.0)  # the steps that `prepare` packs
    half = load_dit(model, dtype=torch.bfloat16)
    eight = load_dit(work / "int8.safetensors", compute="a8")
    four = load_dit(work / "int4.safetensors", compute="a8")
    steps = {
        "bf16": velocity_of(half, sampler, cond, one_batch=True),
        "bf16, two passes": velocity_of(half, sampler, cond),
        "w8a8": velocity_of(eight, sampler, cond),
        "w4a8": velocity_of(four, sampler, cond),
    }
    with torch.inference_mode():
        runs = {name: lambda step=step: step(x, 0.0) for name, step in steps.items()}
        times = all_times(runs, rounds, warm=x.shape[1] <= 512)
        found = {name: step(x, 0.0) for name, step in steps.items()}
        del half, steps, runs
        exact = velocity_of(load_dit(model), sampler, cond)(x, 0.0)
    return {
        "latents": x.shape[1],
        "condition": cond.shape[1],
        "guidance": sampler.guidance,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times": times,
        "n_runs": rounds,
        "error": {
            name: float((value - exact).norm() / exact.norm()) for name, value in found.items()
        },
    }


def text(part: dict[str, Any]) -> str:
    """The section of docs/cpu_figures.md."""
    rows = [
        f"| {found['latents']} + {found['condition']} | {title} | {found['seconds'][name]:.2f} "
        f"| {found['seconds'][name] / found['seconds']['bf16']:.3f} "
        f"| {found['error'][name]:.2%} | {found['n_runs']} |"
        for _, found in sorted(part.items(), key=lambda item: int(item[0]))
        for name, title in ROWS.items()
    ]
    guidance = next(iter(part.values()))["guidance"]
    return (
        "### A guided step of Hunyuan3D-2mini\n\nIn the unconditional pass all condition tokens "
        "are equal and stay equal, so it runs on one token that represents all, exactly. Guidance "
        f"{guidance:g}, which amplifies errors; errors are relative to float32.\n\n"
        + "\n".join(table("| latents + condition | | seconds | of bf16 | error | n |", rows))
    )
