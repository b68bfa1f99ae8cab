"""Times a forward pass of TRELLIS's sparse-structure flow, full size, the paper's kept blocks.

4096 tokens attend to each other and to the image's 1374, so torch spends most of its time in
attention; the row `int8 linears alone` leaves attention to torch's SDPA.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import table
from benchmarks.timing import all_times, register_dots
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.paper import plan_paper
from vitapack.compressor.tools.random_checkpoint import write
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.flow import FlowTransformer
from vitapack.runtime.pipeline.load import load_dit

CONDITION = 1374  # tokens of DINOv2 with registers at 518 pixels
ROWS = {
    "fp32": "torch float32, eager, SDPA",
    "bf16": "torch bf16, eager, SDPA",
    "linears": "int8 linears alone, SDPA in float32",
    "w8a8": "W8A8",
    "mixed": "W8A8 and W4A8 by the paper's layer map",
}


def prepare(work: Path) -> Path:
    """Writes the random checkpoint and its packed files, once; returns the checkpoint.

    Both files have the paper's kept blocks: `mixed` in the paper's bits, `w8a8` all in 8 bits.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = work / "trellis"
    if not model.exists():
        write("trellis-ss", model, parts=("dit",))
    paper = plan_paper("trellis-ss")
    eight = replace(paper, blocks=tuple(replace(block, bits=8) for block in paper.blocks))
    for plan, name in ((paper, "mixed"), (eight, "w8a8")):
        path = work / f"trellis-{name}.safetensors"
        if not path.exists():
            compress(open_checkpoint(model), plan, path, steps=[25])
    return model


def measure(
    work: Path,
    rounds: int,
    earlier: dict[str, Any],
) -> dict[str, Any]:
    """Interleaved seconds of each row, relative errors to float32, and W8A8's time by operation.

    Rounds of the `earlier` result are added.
    """
    dots, dot_gops = register_dots(1.0)
    model = prepare(work)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 16, 16, 16, generator=rng)
    cond = torch.randn(1, CONDITION, 1024, generator=rng)
    t = torch.tensor([1000.0], dtype=torch.float64)
    eight = load_dit(work / "trellis-w8a8.safetensors", compute="a8")
    mixed = load_dit(work / "trellis-mixed.safetensors", compute="a8")
    gone = [("block", i) for i in range(24) if i not in eight.config.blocks]  # type: ignore[union-attr]
    full = load_dit(model).without(*gone)
    half = load_dit(model, dtype=torch.bfloat16).without(*gone)
    found: dict[str, torch.Tensor] = {}

    def run(name: str, call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: found.update({name: call().float()})

    def readable_blocks() -> torch.Tensor:
        return FlowTransformer.evaluate(eight, x, eight.step_modulation(t), Condition(cond))

    runs = {
        "fp32": run("fp32", lambda: full(x, t, cond)),
        "bf16": run("bf16", lambda: half(x.bfloat16(), t, cond.bfloat16())),
        "linears": run("linears", readable_blocks),
        "w8a8": run("w8a8", lambda: eight(x, t, cond)),
        "mixed": run("mixed", lambda: mixed(x, t, cond)),
        "peak": dots,
    }
    with torch.inference_mode():
        runs["w8a8"](), runs["mixed"]()  # allocates scratch memory; torch needs no warm-up
        plan: Any = eight.scratch.plan  # type: ignore[union-attr]
        before, _ = plan.seconds()
        times = all_times(runs, rounds, warm=False)
        after, _ = plan.seconds()
    times = {name: earlier.get("times", {}).get(name, []) + new for name, new in times.items()}
    threads = rounds * torch.get_num_threads()
    exact = found["fp32"]
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = dot_gops / seconds.pop("peak")
    return {
        "tokens": 16**3,
        "condition": CONDITION,
        "blocks": len(eight.config.blocks),  # type: ignore[union-attr]
        "seconds": seconds,
        "times": times,
        "n_runs": len(times["bf16"]),
        "error": {
            name: float((value - exact).norm() / exact.norm())
            for name, value in found.items()
            if name != "fp32"
        },
        "operations": operations(len(eight.config.blocks)),  # type: ignore[union-attr]
        "breakdown": {name: (value - before[name]) / threads for name, value in after.items()},
        "peak_gops": peak,
        "scratch_bytes": plan.nbytes,
    }


def operations(blocks: int) -> float:
    """1e9 operations of the blocks' linears and attention."""
    tokens, hidden = 16**3, 1024
    linears = tokens * 14 + CONDITION * 2  # hidden^2 per token: qkv, proj, q, proj, MLP; k and v
    attention = tokens * (tokens + CONDITION)
    return 1e-9 * blocks * (2 * linears * hidden**2 + 4 * attention * hidden)


def text(part: dict[str, Any]) -> str:
    """The section of docs/cpu_figures.md."""
    seconds, rows = part["seconds"], []
    for name, title in ROWS.items():
        ours = name in ("w8a8", "mixed")
        share = f"{part['operations'] / seconds[name] / part['peak_gops']:.0%}" if ours else ""
        error = f"{part['error'][name]:.2%}" if name in part["error"] else ""
        rows.append(
            f"| {title} | {seconds[name]:.2f} | {seconds[name] / seconds['fp32']:.3f} "
            f"| {seconds[name] / seconds['bf16']:.3f} | {share} | {error} | {part['n_runs']} |"
        )
    whole = seconds["w8a8"]
    longest = sorted(part["breakdown"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in longest[:8])
    return (
        "### A forward pass of TRELLIS's sparse-structure flow\n\n"
        f"{part['tokens']} tokens, {part['condition']} condition tokens, {part['blocks']} of 24 "
        "blocks, random weights; errors relative to float32.\n\n"
        + "\n".join(table("| | seconds | of fp32 | of bf16 | of int8 peak | error | n |", rows))
        + f"\n\nOf W8A8's time: {shares}. Scratch {part['scratch_bytes'] / 1e6:.0f} MB."
    )
