"""Measures the published models at full size, with random weights.

    python -m benchmarks.published sizes --work /tmp/published     # exact, without any weights
    python -m benchmarks.published maps --work /tmp/published      # the paper's own layer maps
    python -m benchmarks.published tables --work /tmp/published    # the paper's tables, exact
    python -m benchmarks.published memory --work /tmp/published    # predicted memory by phase
    python -m benchmarks.published gpu --work /tmp/published       # the tables' latency and memory
    python -m benchmarks.published gpu --tiny --device cpu --work /tmp/published    # a rehearsal
    python -m benchmarks.published generate --work /tmp/published [--resolution 384]    # on the CPU
    python -m benchmarks.published bench --work /tmp/published     # steps, packed and original
    python -m benchmarks.published page                            # docs/published.md from the JSON

Each model is written, measured and deleted in turn: at most 8 GB of disk at a time. Every
measurement runs in a fresh process, whose peak is the kernel's high-water mark.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.published import hollow, paper_tables
from benchmarks.published import memory as published_memory
from benchmarks.published import page as published_page
from benchmarks.published.paper_tables import MODELS
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.compressor.planning.paper import plan_paper
from vitapack.compressor.tools.random_checkpoint import write
from vitapack.runtime.choices import NETWORKS
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "published.json"
ACTIONS = ("sizes", "tables", "memory", "gpu", "maps", "generate", "bench", "page")
GENERATED = ("hunyuan3d-2mini", "step1x-3d", "trellis-ss")
SEEDS = {"hunyuan3d-2mini": 1, "step1x-3d": 3}  # whose random decoder's field has a surface

# Runs one vitapack command and prints the process's peak in bytes, before and after.
CHILD = """
import json, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
from vitapack.runtime.loading.memory import resident
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
    """Runs a command in a fresh process: its figures and its standard output."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, threads, *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"vitapack {' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stderr.strip().splitlines()[-1]), done.stdout


def save(section: str, name: str, figures: dict[str, Any], results: Path | None = None) -> None:
    """Writes figures into the results file at once, so that an interrupted run loses none."""
    results = results or RESULTS
    data = json.loads(results.read_text()) if results.exists() else {}
    data["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    data.setdefault(section, {})[name] = figures
    with atomic_path(results) as part:
        part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def sizes(work: Path, names: list[str]) -> None:
    """Exact file sizes of plans, without compressing."""
    for name in names:
        with hollow.checkpoint(work, name, ("dit",)) as checkpoint:
            exact = {}
            for plan in ("paper", "int8", "int4"):
                exact[plan] = compress(
                    checkpoint, resolve_plan(plan, checkpoint), work / "x.safetensors",
                    steps=[MODELS[name].steps], embed=False, dry_run=True,
                ).total  # fmt: skip
        save("sizes", name, exact)


def tables(work: Path, names: list[str]) -> None:
    for name in names:
        with hollow.checkpoint(work, name, ("dit",)) as checkpoint:
            save("tables", name, paper_tables.counted(name, checkpoint, work / "x.safetensors"))


def memory(work: Path, names: list[str]) -> None:
    for name in names:
        with hollow.checkpoint(work, name, NETWORKS) as checkpoint:
            found = published_memory.predicted(checkpoint, name, work / "x.safetensors")
        save("memory", name, found)


def gpu(work: Path, names: list[str], options: argparse.Namespace) -> None:
    """Latency and memory of the tables' rows, recorded under the GPU's name.

    A rehearsal with tiny models writes its own results and page into the work folder.
    """
    results = work / "rehearsal.json" if options.tiny else RESULTS
    for name in names:
        for row, how, figures in paper_tables.measured(
            work, name, options.device, options.repeats, options.rows, options.tiny
        ):
            data = json.loads(results.read_text()) if results.exists() else {}
            card = data.get("gpu", {}).get(figures["device"], {})
            card.setdefault(name, {}).setdefault(row, {})[how] = figures
            save("gpu", figures["device"], card, results)
            print(name, row, how, json.dumps(figures), flush=True)
        shutil.rmtree(work / name)
    if options.tiny:
        published_page.write(json.loads(results.read_text()), work / "rehearsal.md")


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


def write_both(
    work: Path, name: str, plan: str, options: argparse.Namespace, parts: Sequence[str] = NETWORKS
) -> tuple[Path, Path]:
    """Writes a checkpoint and its packed file; with --keep reuses existing ones."""
    folder, out = work / name, work / f"{name}-{plan}.safetensors"
    if not (options.keep and folder.exists()):
        write(name, folder, parts=parts, seed=SEEDS.get(name, 0))
    if not (options.keep and out.exists()):
        child("compress", str(folder), "--plan", plan, "--steps", str(options.steps), "--no-embed",
              "-o", str(out), "--quiet")  # fmt: skip
    return folder, out


def remove(options: argparse.Namespace, folder: Path, out: Path) -> None:
    if not options.keep:
        shutil.rmtree(folder)
        out.unlink()


def generate(work: Path, names: list[str], options: argparse.Namespace) -> None:
    """One image to a mesh, one network in memory at a time."""
    from vitapack.runtime.families.furniture.family import held_out

    image = next(held_out("unseen-views")).image_path
    for name in names:
        side = 64 if name == "trellis-ss" else options.resolution
        extra = () if name == "trellis-ss" else ("--resolution", str(side))
        folder, out = write_both(work, name, "paper", options)
        measured, text = child(
            "generate", str(out), str(image), "-o", str(work / "meshes"), "--parts", str(folder),
            "--memory", "lean", "--compute", options.compute, "--device", "cpu", "--steps",
            str(options.steps), "--json", "--quiet", *extra,
        )  # fmt: skip
        row = json.loads(text)["written"][0]
        figures = {"model": name, "compute": options.compute, "steps": options.steps}
        figures |= {"resolution": side, "generate": measured}
        figures |= {key: row[key] for key in ("seconds", "bytes", "mesh", "queries")}
        suffix = "" if options.compute == "a8" else f", {options.compute}"
        save("generations", f"{name}, {side}{suffix}", figures)
        print(name, json.dumps(figures), flush=True)
        remove(options, folder, out)


def bench(work: Path, names: list[str], options: argparse.Namespace) -> None:
    """`vitapack bench` of a packed DiT and its original, and of one generation by each."""
    for name in names:
        folder, out = write_both(work, name, options.plans[0], options)
        measured, text = child(
            "bench", str(out), "--original", str(folder), "--compute", "a8", "--device", "cpu",
            "--repeats", str(options.repeats), "--steps", str(options.steps),
            "--resolution", str(options.resolution), "--json", "--quiet",
        )  # fmt: skip
        about = {"model": out.name, "plan": options.plans[0], "process": measured}  # no local path
        save("bench", name, json.loads(text) | about)
        print(text, flush=True)
        remove(options, folder, out)


def page() -> None:
    published_page.write(json.loads(RESULTS.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--work", type=Path, default=Path("published-work"))
    parser.add_argument("--models", nargs="+", choices=published_memory.MODELS)
    parser.add_argument("--plans", nargs="+", default=["paper"], choices=("paper", "int8", "int4"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--compute", choices=("a8", "a16"), default="a8", help="for `generate`")
    parser.add_argument("--device", default="cuda", help="for `gpu`")
    parser.add_argument("--rows", nargs="+", default=list(paper_tables.ROWS),
                        choices=paper_tables.ROWS, help="for `gpu`")  # fmt: skip
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="for `gpu`: a rehearsal with narrow networks, not recorded",
    )
    parser.add_argument("--repeats", type=int, default=5, help="for `gpu` and `bench`")
    parser.add_argument(
        "--keep", action="store_true", help="for `generate` and `bench`: reuse files and keep them"
    )
    options = parser.parse_args()
    if options.action == "sizes":
        sizes(options.work, options.models or list(MODELS))
    elif options.action == "tables":
        tables(options.work, options.models or list(MODELS))
    elif options.action == "memory":
        memory(options.work, options.models or list(published_memory.MODELS))
    elif options.action == "gpu":
        gpu(options.work, options.models or list(MODELS), options)
    elif options.action == "maps":
        maps(options.work, options.models or list(MODELS), options.plans)
    elif options.action == "bench":
        bench(options.work, options.models or ["hunyuan3d-2mini"], options)
    elif options.action == "generate":
        generate(options.work, options.models or list(GENERATED), options)
    page()


if __name__ == "__main__":
    main()
