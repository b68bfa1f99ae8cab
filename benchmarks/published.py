"""The published models at full size, with random weights: sizes, compression, whole passes.

    python -m benchmarks.published sizes --work /tmp/published     # exact, without any weights
    python -m benchmarks.published maps --work /tmp/published      # the paper's own layer maps
    python -m benchmarks.published tables --work /tmp/published    # the paper's tables, likewise
    python -m benchmarks.published gpu --work /tmp/published       # their rest, on a GPU of yours
    python -m benchmarks.published passes --work /tmp/published    # picture to mesh on the CPU
    python -m benchmarks.published page                            # docs/published.md from the JSON

Each model is written, measured and deleted in turn: at most 8 GB of disk at a time. Every measured
process is a fresh one, whose peak is the kernel's own high-water mark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import paper_tables
from benchmarks.markdown import table
from benchmarks.paper_tables import MODELS
from vitapack.compressor.compress import compress
from vitapack.compressor.paper_maps import plan_paper
from vitapack.compressor.plan import resolve_plan
from vitapack.compressor.random_checkpoint import files_of, write
from vitapack.runtime.container import lay_out
from vitapack.runtime.errors import atomic_path
from vitapack.runtime.families import Checkpoint, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "published.json"
PAGE = ROOT / "docs" / "published.md"
PASSES = ("hunyuan3d-2mini", "step1x-3d", "trellis-ss")

# Runs one command of vitapack's and prints the process' peak, in bytes, before and after.
CHILD = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from vitapack.runtime.memory import resident
base = resident(peak=True)
from vitapack import cli
start = time.perf_counter()
try:
    cli.main(sys.argv[2:])
except SystemExit as stop:
    if stop.code:
        raise
print(json.dumps({"seconds": time.perf_counter() - start, "base": base,
                  "peak": resident(peak=True)}), file=sys.stderr)
"""


def child(*arguments: str) -> tuple[dict[str, Any], str]:
    """A fresh process' figures and its standard output."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, threads, *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"vitapack {' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stderr.strip().splitlines()[-1]), done.stdout


def save(section: str, name: str, figures: dict[str, Any]) -> None:
    """Into the results file at once, so that an interrupted run keeps what it has."""
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    data["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    data.setdefault(section, {})[name] = figures
    with atomic_path(RESULTS) as part:
        part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


@contextmanager
def empty(work: Path, name: str) -> Iterator[Checkpoint]:
    """A full-size checkpoint whose weights are holes: no bytes on disk."""
    folder = work / f"{name}-empty"
    files = files_of(name, ("dit",))
    for place, specs in files.tensors.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        layout = lay_out(specs, {})
        with (folder / place).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
    for place, text in files.texts.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text)
    yield open_checkpoint(folder)
    shutil.rmtree(folder)


def sizes(work: Path, names: list[str]) -> None:
    """Exact file sizes of plans that need not be carried out."""
    for name in names:
        with empty(work, name) as checkpoint:
            exact = {}
            for plan in ("paper", "int8", "int4"):
                exact[plan] = compress(
                    checkpoint, resolve_plan(plan, checkpoint), work / "x.safetensors",
                    steps=[MODELS[name].steps], embed=False, dry_run=True,
                ).total  # fmt: skip
        save("sizes", name, exact)


def tables(work: Path, names: list[str]) -> None:
    for name in names:
        with empty(work, name) as checkpoint:
            save("tables", name, paper_tables.counted(name, checkpoint, work / "x.safetensors"))


def gpu(work: Path, names: list[str], device: str, repeats: int) -> None:
    """Latency and memory of the tables' rows, into the results under the card's name."""
    for name in names:
        for row, how, figures in paper_tables.measured(work, name, device, repeats):
            data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            card = data.get("gpu", {}).get(figures["device"], {})
            card.setdefault(name, {}).setdefault(row, {})[how] = figures
            save("gpu", figures["device"], card)
            print(name, row, how, json.dumps(figures), flush=True)
        shutil.rmtree(work / name)


def maps(work: Path, names: list[str], plans: list[str]) -> None:
    for name in names:
        steps = MODELS[name].steps
        folder, out = work / name, work / f"{name}.safetensors"
        start = time.perf_counter()
        write(name, folder, parts=("dit",))
        wrote = time.perf_counter() - start
        checkpoint = open_checkpoint(folder)
        figures: dict[str, Any] = {
            "parameters": checkpoint.parameters(),
            "fp16_bytes": 2 * checkpoint.parameters(),
            "source_bytes": checkpoint.source(hashed=False)["bytes"],
            "write_seconds": wrote,
            "steps": steps,
            "assumed": list(plan_paper(name).notes["assumed"]),
            "maps": {},
        }
        for plan in plans:
            measured, text = child(
                "compress", str(folder), "--plan", plan, "--steps", str(steps), "--no-embed",
                "-o", str(out), "--json", "--quiet",
            )  # fmt: skip
            figures["maps"][plan] = measured | {
                "file_bytes": out.stat().st_size,
                "sizes": json.loads(text),
                "gigabytes_per_second": figures["source_bytes"] / measured["seconds"] / 1e9,
            }
            out.unlink()
            save("maps", name, figures)
            print(name, plan, json.dumps(figures["maps"][plan])[:400], flush=True)
        shutil.rmtree(folder)


def passes(work: Path, names: list[str], steps: int, resolution: int) -> None:
    from vitapack.runtime.families.furniture import held_out

    picture = next(held_out("unseen-views")).image_path
    for name in names:
        folder, out, meshes = work / name, work / f"{name}.safetensors", work / "meshes"
        write(name, folder)
        compressed, _ = child(
            "compress", str(folder), "--plan", "paper", "--steps", str(steps), "--no-embed",
            "-o", str(out), "--json", "--quiet",
        )  # fmt: skip
        extra = () if name == "trellis-ss" else ("--resolution", str(resolution))
        measured, text = child(
            "generate", str(out), str(picture), "-o", str(meshes), "--parts", str(folder),
            "--memory", "lean", "--compute", "a8", "--device", "cpu", "--json", "--quiet", *extra,
        )  # fmt: skip
        row = json.loads(text)["written"][0]
        save("passes", name, {
            "steps": steps,
            "resolution": 64 if name == "trellis-ss" else resolution,
            "compress": compressed,
            "generate": measured,
            "seconds": row["seconds"],
            "bytes": row["bytes"],
            "mesh": row["mesh"],
        })  # fmt: skip
        print(name, json.dumps(measured), json.dumps(row["bytes"]), flush=True)
        shutil.rmtree(folder)
        out.unlink()


def gib(count: float) -> str:
    return f"{count / 2**30:.3f}"


def page() -> None:
    """docs/published.md, from the results alone."""
    data = json.loads(RESULTS.read_text())
    machine = data["machine"]
    found = data.get("maps", {})
    lines = [
        "# The published models at full size",
        "",
        "Random weights in the released layouts (`vitapack random-checkpoint`): sizes, operations",
        "and memory are real, no mesh means anything. Written by",
        f"`python -m benchmarks.published` on {machine['cores']} cores of {machine['cpu']}, torch "
        f"{machine['torch']},",
        "shared with other work: seconds are upper bounds.",
        "",
        *paper_tables.lines(data.get("tables", {}), data.get("gpu", {})),
        *maps_lines(found, data.get("sizes", {})),
        "## Compressing them, disk to disk",
        "",
        "Peak of the whole process, and what of it is beyond Python with torch imported.",
        "",
        *table(
            "| model | plan | source GB | seconds | GB/s | peak GB | beyond torch GB |",
            [
                f"| {name} | {plan} | {row['source_bytes'] / 1e9:.2f} | {entry['seconds']:.0f} | "
                f"{entry['gigabytes_per_second']:.3f} | {entry['peak'] / 1e9:.2f} | "
                f"{(entry['peak'] - entry['base']) / 1e9:.2f} |"
                for name, row in found.items()
                for plan, entry in row["maps"].items()
            ],
        ),
        "",
    ]
    if ran := data.get("passes"):
        lines += passes_lines(ran)
    with atomic_path(PAGE) as part:
        part.write_text("\n".join(lines))


def maps_lines(found: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found.items():
        exact = {plan: gib(count) for plan, count in sizes.get(name, {}).items()}
        rows.append(
            f"| {name} | {gib(row['fp16_bytes'])} | {row['steps']} | "
            f"{MODELS[name].rows['adaptive'].gib:g} | "
            f"**{gib(row['maps']['paper']['file_bytes'])}** | {exact.get('int8', '')} | "
            f"{exact.get('int4', '')} |"
        )
    return [
        "## The paper's layer maps",
        "",
        "Every linear of a kept block in 8 or 4 bits, modulation as exact fp16 tables at the given",
        "steps. GiB; `paper` is what it states for its own format with the same map.",
        "",
        *table("| model | fp16 | steps | paper | ours | int8, unpruned | int4, unpruned |", rows),
        "",
        "Which blocks the paper pruned is published in part; what was assumed:",
        "",
        *(f"- {name}: {text}" for name, row in found.items() for text in row["assumed"]),
        "",
    ]


def passes_lines(ran: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in ran.items():
        cells = [
            f"{part['predicted'] / 1e9:.2f} / {part['peak'] / 1e9:.2f}"
            for part in (row["bytes"][phase] for phase in ("condition", "denoise", "decode"))
        ]
        peak = max(part["peak"] for part in row["bytes"].values())
        rows.append(
            f"| {name} | {row['steps']} | {row['resolution']} | {' | '.join(cells)} | "
            f"{peak / 1e9:.2f} | {(peak - row['generate']['base']) / 1e9:.2f} |"
        )
    return [
        "## Picture to mesh on the CPU, one network in memory at a time",
        "",
        "The paper's map packed, int8 activations, encoder in 8 bits, guidance in two passes,",
        "few steps. GB: predicted weights and grid, without activations / process peak.",
        "",
        *table(
            "| model | steps | grid | condition | denoise | decode | process | beyond torch |", rows
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("sizes", "tables", "gpu", "maps", "passes", "page"))
    parser.add_argument("--work", type=Path, default=Path("published-work"))
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS))
    parser.add_argument("--plans", nargs="+", default=["paper"], choices=("paper", "int8", "int4"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--device", default="cuda", help="of `gpu`")
    parser.add_argument("--repeats", type=int, default=5, help="of `gpu`")
    options = parser.parse_args()
    if options.what == "sizes":
        sizes(options.work, options.models or list(MODELS))
    elif options.what == "tables":
        tables(options.work, options.models or list(MODELS))
    elif options.what == "gpu":
        gpu(options.work, options.models or list(MODELS), options.device, options.repeats)
    elif options.what == "maps":
        maps(options.work, options.models or list(MODELS), options.plans)
    elif options.what == "passes":
        passes(options.work, options.models or list(PASSES), options.steps, options.resolution)
    page()


if __name__ == "__main__":
    main()
