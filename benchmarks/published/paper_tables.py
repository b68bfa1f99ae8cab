"""The paper's Tables 1, 2, 3 and D, as far as they need no trained weights, with our figures.

    python -m benchmarks.published tables --work /tmp/published    # sizes and operations, exact
    python -m benchmarks.published gpu --work /tmp/published       # on a GPU: latency and memory
    python -m benchmarks.published gpu --tiny --device cpu --work /tmp/published    # a rehearsal

The second command is for owners of a GPU (A6000, A100, ...). For every model it writes random
weights in the released layout (up to 5 GB of disk at a time), packs each row of the tables, runs
the whole denoising loop in a fresh process, and adds seconds and bytes to the same results and page
under the GPU's name. Latency and memory do not depend on the weights' values; packing takes most of
the time. The third command does the same with narrow networks of the same depth; its figures are
meaningless and stay in the work folder.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from vitapack.compressor.planning.paper import plan_paper
from vitapack.runtime.format.layermap import BlockEntry, LayerMap

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Paper:
    """The paper's figures for one row of a model, on an RTX A6000; None if it states none."""

    gib: float  # the paper writes GB
    tflop: float | None = None  # per step
    seconds: float | None = None  # per shape
    vram: float | None = None  # GiB
    run: float | None = None  # TFLOP per shape


@dataclass(frozen=True)
class Model:
    """How a model runs in the tables."""

    steps: int
    latents: tuple[int, ...]
    rows: dict[str, Paper]


# Rows: all blocks, or those that the paper's layer map keeps, in these bits.
ROWS = ("original", "pruned", "pruned, 4 bits", "pruned, 8 bits", "adaptive")
BITS = {"pruned": 16, "pruned, 4 bits": 4, "pruned, 8 bits": 8}
MODELS = {
    "hunyuan3d-2.0": Model(
        20,
        (3072, 64),
        {
            "original": Paper(2.704, 18.502, 5.85, 2.463, 370.03),
            "pruned": Paper(1.575),
            "pruned, 4 bits": Paper(0.709),
            "pruned, 8 bits": Paper(1.031),
            "adaptive": Paper(0.909, 14.649, 3.90, 1.761, 292.98),
        },
    ),
    "hunyuan3d-2mini": Model(
        20,
        (512, 64),
        {
            "original": Paper(1.042, 2.980, 1.28, 1.224, 59.59),
            "pruned": Paper(0.954),
            "pruned, 4 bits": Paper(0.442),
            "pruned, 8 bits": Paper(0.622),
            "adaptive": Paper(0.578, 2.732, 1.14, 1.135, 54.64),
        },
    ),
    "step1x-3d": Model(
        30,
        (2048, 64),
        {
            "original": Paper(2.452, 9.689, 6.23, 2.718, 290.68),
            "pruned": Paper(1.123, 3.774, 2.46, 1.417),
            "pruned, 4 bits": Paper(0.803, 3.775, 3.02, 1.136),
            "pruned, 8 bits": Paper(0.910, 3.775, 2.63, 1.212),
            "adaptive": Paper(0.843, 3.775, 2.78, 1.206, 113.24),
        },
    ),
    "trellis-ss": Model(
        25,
        (8, 16, 16, 16),
        {
            "original": Paper(1.078, 5.23, 3.716, 1.188),
            "adaptive": Paper(0.320, 3.92, 2.802, 0.442),
        },
    ),
}
NOTES = """\
- Sizes are of the network alone; ours include the modulation as exact fp16 tables for these steps.
- Operations include attention; guidance is a batch of two (TRELLIS: one forward pass). The paper
  counts Step1X-3D without attention; our count without attention is in brackets. Its TFLOP for the
  compressed 2mini are those of 22 blocks, its 0.954 GiB those of 21, as here.
- Per shape, evaluations that the solver multiplies by zero are skipped, TRELLIS uses guidance in an
  interval only, and the unconditional pass needs a single token, since all its tokens are equal.
- The released Hunyuan3D 2.0 network has 1,113,274,432 parameters, 2.074 GiB in fp16, not 2.704;
  TRELLIS's has 1.035, not 1.078.
- Latency and memory of the paper: RTX A6000. Ours: the denoising loop of one shape, from noise to
  latents; memory is torch's peak of allocated bytes, weights included."""


def layer_map(name: str, row: str) -> LayerMap:
    """The layer map of a row; "original" is not packed and has none."""
    paper = plan_paper(name)
    if row == "adaptive":
        return paper
    blocks = tuple(BlockEntry(b.kind, b.index, BITS[row]) for b in paper.blocks)
    return replace(paper, blocks=blocks, how=row)


def counted(name: str, checkpoint: Any, out: Path) -> dict[str, Any]:
    """Bytes, blocks and operations of every row; reads and writes no weight."""
    from vitapack.compressor.packing.compress import compress
    from vitapack.runtime.families.open import FAMILIES
    from vitapack.runtime.format.architecture import DiTConfig
    from vitapack.runtime.format.layermap import BLOCK_FIELDS
    from vitapack.runtime.tools.flops import run_flops, step_flops

    model, found = MODELS[name], {}
    tokens = FAMILIES[checkpoint.family].condition_tokens(name)
    sampler = replace(checkpoint.sampler, steps=model.steps)
    for row in ROWS:
        config, size = checkpoint.config, 2 * checkpoint.parameters()
        kept = LayerMap.uniform(checkpoint.family, plan_paper(name).totals, 16)
        if row != "original":
            kept = layer_map(name, row)
            config = replace(config, **{BLOCK_FIELDS[k]: kept.kept(k) for k in kept.totals})
            size = compress(
                checkpoint, kept, out, steps=[model.steps], embed=False, dry_run=True
            ).total
        batch = 2 if isinstance(config, DiTConfig) else 1
        found[row] = {
            "bytes": size,
            "blocks": {kind: len(kept.kept(kind)) for kind in kept.totals},
            "step": step_flops(config, model.latents, tokens, batch).to_json(),
            "run": run_flops(config, model.latents, tokens, sampler),
        }
    return found


# --- On a GPU ------------------------------------------------------------------------------------


TINY_TOKENS = 5  # condition tokens of a rehearsal


def tiny_latents(name: str) -> tuple[int, ...]:
    return (8, 4, 4, 4) if name == "trellis-ss" else (6, 64)


def tiny_sizes(name: str) -> Any:
    """A narrow network of the model's own depth, since the rows keep the paper's blocks."""
    from vitapack.compressor.tools.random_checkpoint import Sizes
    from vitapack.runtime.condition.dinov2 import Dinov2Config

    return Sizes(
        hidden=32, heads=1, depth=tuple(plan_paper(name).totals.values()),
        latents=tiny_latents(name)[1 if name == "trellis-ss" else 0],
        encoder=Dinov2Config(64, 1, 1, 14, 3, 0, 4, swiglu=True),
    )  # fmt: skip


def measured(
    work: Path,
    name: str,
    device: str,
    repeats: int,
    rows: Sequence[str] = ROWS,
    tiny: bool = False,
) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yields (row, how, figures); "how" is a16, a8, or the original's dtype."""
    from vitapack.compressor.packing.compress import compress
    from vitapack.compressor.tools.random_checkpoint import write
    from vitapack.runtime.families.open import open_checkpoint

    folder, out = work / name, work / f"{name}.safetensors"
    write(name, folder, parts=("dit",), sizes=tiny_sizes(name) if tiny else None)
    checkpoint = open_checkpoint(folder)
    for row in rows:
        if row == "original":
            figures = run(folder, name, device, "a16", repeats, tiny)
            yield row, figures["dtype"], figures
            continue
        kept, steps = layer_map(name, row), [MODELS[name].steps]
        compress(checkpoint, kept, out, quantizer="rtn", steps=steps, embed=False)
        for compute in ("a16",) if BITS.get(row) == 16 else ("a16", "a8"):
            yield row, compute, run(out, name, device, compute, repeats, tiny)
        out.unlink()


def run(
    path: Path, name: str, device: str, compute: str, repeats: int, tiny: bool
) -> dict[str, Any]:
    """`denoise_times` in a fresh process, so that its memory holds nothing else."""
    words = [str(path.resolve()), name, device, compute, str(repeats), "tiny" if tiny else "full"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.published.paper_tables", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{path}, {compute}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def denoise_times(
    path: str | Path,
    name: str,
    device: str,
    compute: str,
    repeats: int,
    latents: Sequence[int] | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Seconds and bytes of whole denoising loops: guidance in two passes, random condition tokens.

    latents, tokens: the tables' by default.
    """
    import torch

    from vitapack.runtime.engines.device import chosen_device
    from vitapack.runtime.families.open import FAMILIES, open_checkpoint
    from vitapack.runtime.format.header import read_header
    from vitapack.runtime.format.schedules import SamplerDefaults
    from vitapack.runtime.loading.checkpoint_files import is_packed
    from vitapack.runtime.pipeline.load import load_dit
    from vitapack.runtime.sampling.guidance import denoise

    device, path = chosen_device(device), Path(path)
    gpu = device != "cpu"
    if is_packed(path):
        header = read_header(path)
        family, sampler = header.family, SamplerDefaults.from_json(header.sampler)
    else:
        checkpoint = open_checkpoint(path)
        family, sampler = checkpoint.family, checkpoint.sampler
    sampler = replace(sampler, steps=MODELS[name].steps)
    dtype = torch.float16 if gpu else torch.float32
    network = load_dit(path, dtype=dtype, device=device, compute=compute)
    rng = torch.Generator().manual_seed(0)
    tokens = tokens or FAMILIES[family].condition_tokens(name)
    cond = torch.randn(1, tokens, network.config.cond_channels, generator=rng).to(device)
    noise = torch.randn(1, *(latents or MODELS[name].latents), generator=rng)
    seconds = []
    for attempt in range(repeats + 1):  # the first compiles and warms up
        if gpu and attempt == 1:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        denoise(network, sampler, cond, noise)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "dtype": "fp16" if gpu else "fp32",
        "torch": torch.__version__,
        "seconds": statistics.median(seconds[1:] or seconds),
        "n": repeats,
        "allocated": torch.cuda.max_memory_allocated() if gpu else None,
        "reserved": torch.cuda.max_memory_reserved() if gpu else None,
    }


# --- The page ------------------------------------------------------------------------------------


def lines(counts: dict[str, Any], cards: dict[str, Any]) -> list[str]:
    """The section of docs/published.md; `cards`: figures by GPU, model, row and how."""
    head = (
        "| model | row | blocks | GiB, paper | GiB | TFLOP per step, paper | TFLOP per step "
        "| TFLOP per shape, paper | TFLOP per shape | s, paper | peak GiB, paper |"
    )
    rows = []
    for name, found in counts.items():
        for row in ROWS:
            ours = found[row]
            paper = MODELS[name].rows.get(row)
            blocks = " + ".join(map(str, ours["blocks"].values()))
            whole, inner = ours["step"]["total"], ""
            if name.startswith("step1x"):
                inner = f" ({(whole - ours['step']['attention']) / 1e12:.3f})"
            rows.append(
                f"| {name} | {row} | {blocks} | {stated(paper, 'gib')} | "
                f"**{ours['bytes'] / 2**30:.3f}** | {stated(paper, 'tflop')} | "
                f"{whole / 1e12:.3f}{inner} | "
                f"{stated(paper, 'run')} | {ours['run'] / 1e12:.1f} | "
                f"{stated(paper, 'seconds')} | {stated(paper, 'vram')} |"
            )
    text = [
        "## Tables 1, 2, 3 and D of the paper, except columns that need trained weights",
        "",
        "Rows: the original; without the blocks that the paper prunes; the kept blocks in 4 or 8",
        "bits; in the paper's adaptive bits.",
        "",
        *table(head, rows),
        "",
        NOTES,
        "",
        "Seconds and memory: `python -m benchmarks.published gpu` measures them on your GPU and",
        "adds them here, next to the paper's.",
        "",
    ]
    if not cards:
        return [*text, "Compiled, not timed: no GPU has run it yet.", ""]
    timed = [
        f"| {card} | {name} | {row} | {how} | {f['seconds']:.2f} | {f['n']} | "
        f"{stated(MODELS[name].rows.get(row), 'seconds')} | {memory(f['allocated'])} | "
        f"{memory(f['reserved'])} | {stated(MODELS[name].rows.get(row), 'vram')} |"
        for card, models in cards.items()
        for name, found in models.items()
        for row, hows in found.items()
        for how, f in hows.items()
    ]
    head = (
        "| GPU | model | row | compute | s | n | s, paper | GiB allocated | GiB reserved "
        "| GiB, paper |"
    )
    return [*text, *table(head, timed), ""]


def stated(paper: Paper | None, field: str) -> str:
    value = getattr(paper, field, None)
    return "" if value is None else f"{value:g}"


def memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.3f}"


if __name__ == "__main__":
    path, model, device, compute, count, size = sys.argv[1:]
    small = (tiny_latents(model), TINY_TOKENS) if size == "tiny" else ()
    print(json.dumps(denoise_times(path, model, device, compute, int(count), *small)))
