"""Compares the CPU engine with torch and other libraries: JSON first, then the pages from it.

Each processor has one JSON file in benchmarks/results/cpu. docs/cpu.md compares them,
docs/cpu_figures.md shows them all.

    python -m benchmarks.cpu --work DIR                    # all parts, about 20 minutes
    python -m benchmarks.cpu --work DIR --parts gemm,dit   # only these
    python -m benchmarks.cpu --page-only                   # only both pages, from the JSON

Parts:
    gemm, attention  GOP/s as a fraction of the int8 peak measured in the same run
    dit        a Hunyuan3D-2mini forward pass, random weights, batch 2
    guided     a guided step as the pipeline runs it, and as one batch of two
    errors     relative errors of the forward pass; not timed
    breakdown  time of the forward pass by operation
    memory     peak RSS and load time of a process that only loads and runs the network
    peers      the same forward pass in other installed libraries
    furniture  V-IoU of int8 activations against weight-only
    trellis    a forward pass of TRELLIS's flow transformer

Runs that are compared are interleaved in one process; times are medians. DIR keeps the random
checkpoints and their packed files. Run it on an idle machine: each part takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cpu import furniture as cpu_furniture
from benchmarks.cpu import guided as cpu_guided
from benchmarks.cpu import int4 as cpu_int4
from benchmarks.cpu import page as cpu_page
from benchmarks.cpu import peers as cpu_peers
from benchmarks.cpu import trellis as cpu_trellis
from benchmarks.cpu.mini import (
    CONDITION,
    HEAD,
    HEADS,
    float32_output,
    inputs,
    linear_gops,
    prepare,
    relative,
)
from benchmarks.timing import Run, all_times, interleaved, register_dots
from vitapack.kernels.linear import cpu
from vitapack.kernels.linear.layouts import W8, WeightLayout, layout_for
from vitapack.kernels.linear.weights import from_codes, int8_weight
from vitapack.runtime.pipeline.load import load_dit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
# CPU family and model of /proc/cpuinfo -> file name and title.
PROCESSORS = {
    "6 207": ("emerald-rapids", "Intel Xeon, Emerald Rapids"),
    "25 17": ("zen4", "AMD EPYC, Zen 4"),
}
PARTS = (
    "gemm", "attention", "dit", "guided", "errors", "breakdown", "memory", "peers", "furniture",
    "trellis",
)  # fmt: skip
SHAPES = ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024), (1024, 7168), (5120, 1024))
ROWS = (128, 3764)  # a small GEMM; all tokens of 2mini at 512 latents, batch 2


def packed(n: int, k: int, layout: WeightLayout) -> cpu.Panels:
    """A random weight (n, k) in the engine's panels."""
    scale, bias = torch.rand(n) * 1e-3, torch.zeros(n)
    if not layout.group:
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return cpu.pack(int8_weight(codes, scale), bias)
    codes = torch.randint(0, layout.largest + 1, (n, layout.padded(k)), dtype=torch.uint8)
    group = torch.randint(0, 8, (n, layout.groups(k)), dtype=torch.uint8) * 16 + 8
    return cpu.pack(from_codes(layout, k, codes, scale, group), bias)


def gemm(rounds: int) -> dict[str, Any]:
    """GOP/s from bf16 to bf16; dynamic quantization, product, scales and bias are timed.

    Outputs are allocated in advance: fresh pages would cost up to a third of the time.
    """
    rows = []
    for m in ROWS:
        for k, n in SHAPES:
            x = torch.randn(m, k).bfloat16()
            weight, bias = torch.randn(n, k).bfloat16(), torch.zeros(n).bfloat16()
            w8, w4 = packed(n, k, W8), packed(n, k, layout_for(4, 64))
            out = torch.empty(m, n, dtype=torch.bfloat16)
            repeats = 1 + 12288 // m
            dots, dot_gops = register_dots(0.1 / repeats)
            runs: dict[str, Run] = {
                "bf16": lambda x=x, w=weight, b=bias, o=out: torch.addmm(b, x, w.t(), out=o),
                "w8a8": lambda x=x, w=w8, o=out: cpu.linear_a8(x, w, out=o),
                "w4a8": lambda x=x, w=w4, o=out: cpu.linear_a8(x, w, out=o),
                "w8a16": lambda x=x, w=w8: cpu.linear_a16(x, w),
                "peak": dots,
            }
            seconds = interleaved(runs, rounds, repeats=repeats)
            peak = dot_gops / seconds.pop("peak")
            gops = {name: 2e-9 * m * n * k / value for name, value in seconds.items()}
            rows.append({"m": m, "k": k, "n": n, "gops": gops, "peak_gops": peak})
    return {"n_runs": rounds, "rows": rows}


def attention(rounds: int) -> dict[str, Any]:
    """Attention of batch 2, 16 heads of 64, from float32 qkv to float32, quantization included."""
    rows = []
    dots, dot_gops = register_dots(0.1)
    for tokens in (512 + CONDITION, 3072 + CONDITION):
        qkv = torch.randn(2, tokens, 3, HEADS, HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        half = [part.bfloat16().contiguous() for part in (q, k, v)]
        ours = cpu.Attention(2, tokens, HEADS, HEAD)
        seconds = interleaved(
            {
                "bf16": lambda h=half: F.scaled_dot_product_attention(*h),
                "int8": lambda f=ours, x=qkv: f(x),
                "peak": dots,
            },
            rounds,
        )
        exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rough = F.scaled_dot_product_attention(*half).float().transpose(1, 2).flatten(2)
        peak = dot_gops / seconds.pop("peak")
        operations = 4e-9 * 2 * HEADS * tokens**2 * HEAD
        rows.append(
            {
                "tokens": tokens,
                "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
                "gops": operations / seconds["int8"],
                "peak_gops": peak,
                "error": {"int8": relative(ours(qkv), exact), "bf16": relative(rough, exact)},
            }
        )
    return {"n_runs": rounds, "rows": rows}


def dit(work: Path, latents: int, rounds: int, earlier: dict[str, Any]) -> dict[str, Any]:
    """The forward pass, interleaved with torch's bf16; rounds of the `earlier` result are added."""
    model = prepare(work)
    args = x, t, cond = inputs(latents)
    with torch.no_grad():
        eight = load_dit(work / "int8.safetensors", compute="a8")
        four = load_dit(work / "int4.safetensors", compute="a8")
        half = load_dit(model, dtype=torch.bfloat16)
        runs: dict[str, Run] = {
            "bf16": lambda: half(x.bfloat16(), t, cond.bfloat16()),
            "w8a8": lambda: eight(*args),
            "w4a8": lambda: four(*args),
        }
        runs["peak"], dot_gops = register_dots(1.0)
        times = all_times(runs, rounds, warm=latents <= 512)
        times = {name: earlier.get("times", {}).get(name, []) + new for name, new in times.items()}
        seconds = {name: statistics.median(values) for name, values in times.items()}
        peak = dot_gops / seconds.pop("peak")
        operations = linear_gops(latents)
        return {
            "latents": latents,
            "condition": CONDITION,
            "seconds": seconds,
            "times": times,
            "n_runs": len(times["bf16"]),
            "operations": operations,
            "peak_gops": peak,
            "share_of_peak": sum(operations.values()) / seconds["w8a8"] / peak,
            "scratch_bytes": eight.scratch.nbytes,  # type: ignore[operator]
        }


def errors(work: Path) -> dict[str, float]:
    """Relative errors to the float32 original at 512 latents."""
    model = prepare(work)
    args = x, t, cond = inputs(512)
    found: dict[str, float] = {}
    with torch.no_grad():
        exact = float32_output(work, 512)
        half = load_dit(model, dtype=torch.bfloat16)
        found["bf16"] = relative(half(x.bfloat16(), t, cond.bfloat16()), exact)
        for bits in (8, 4):
            for compute, name in (("a8", f"w{bits}a8"), ("a16", f"w{bits} alone")):
                module = load_dit(work / f"int{bits}.safetensors", compute=compute)
                found[name] = relative(module(*args), exact)
        module = cpu_int4.float_group_dit(work / "int4.safetensors", model)
        found["w4 float groups"] = relative(module(*args), exact)
    return found


def breakdown(work: Path, latents: int, rounds: int) -> dict[str, Any]:
    """Seconds of a forward pass by operation: the sum over threads, divided by their number.

    `waiting`: for other threads at the end of a phase; `outside`: the modulation row, and Python.
    """
    prepare(work)
    args = inputs(latents)
    tokens, hidden = 2 * (latents + CONDITION), HEADS * HEAD
    square = 2e-9 * tokens * hidden**2  # of 8 double and 16 single blocks
    unread = 2e-9 * 2 * CONDITION * hidden**2  # outputs that nothing reads, see linear_gops
    operations = {
        "linear qkv": 24 * 3 * square - unread,
        "linear proj": 8 * square,
        "linear up, GELU": 24 * 4 * square - 4 * unread,
        "linear down": 8 * 4 * square,
        "linear2": 16 * 5 * square - 5 * unread,
        "attention": linear_gops(latents)["attention"],
    }
    found: dict[str, Any] = {"latents": latents, "n_runs": rounds, "operations": operations}
    dots, dot_gops = register_dots(0.3)
    peaks = []
    for bits in (8, 4):
        module: Any = load_dit(work / f"int{bits}.safetensors", compute="a8")
        with torch.no_grad():
            module(*args)
            before, phases_before = module.scratch.plan.seconds()
            whole = 0.0
            for _ in range(rounds):
                started = time.perf_counter()
                module(*args)
                whole += (time.perf_counter() - started) / rounds
                started = time.perf_counter()
                dots()
                peaks.append(dot_gops / (time.perf_counter() - started))
        after, phases_after = module.scratch.plan.seconds()
        threads = rounds * torch.get_num_threads()
        seconds = {name: (value - before[name]) / threads for name, value in after.items()}
        phases = (phases_after - phases_before) / rounds
        seconds["waiting"] = phases - sum(seconds.values())
        seconds["outside"] = whole - phases
        found[f"w{bits}a8"] = {"whole": whole, "seconds": seconds}
    found["peak_gops"] = statistics.median(peaks)
    return found


def memory(work: Path) -> dict[str, Any]:
    """Peak resident memory and load time of a process that loads a packed file and runs a step."""
    prepare(work)
    found = {}
    for plan in ("int8", "int4"):
        for latents in (512, 3072):
            command = [sys.executable, "-m", "benchmarks.cpu.memory", work / f"{plan}.safetensors"]
            out = subprocess.run(
                [*map(str, command), str(latents)], check=True, capture_output=True, text=True
            ).stdout
            found[f"{plan}, {latents} latents"] = json.loads(out.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line]
    info = {name.strip(): value.strip() for name, value in lines}
    number = f"{info['cpu family']} {info['model']}"
    file, title = PROCESSORS.get(number, (number.replace(" ", "-"), info["model name"]))
    if cpu.instruction_set().startswith("amx"):  # a virtual machine may hide it
        file, title = f"{file}-amx", f"{title} with AMX"
    return {
        "file": file,
        "processor": title,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoints and packed files")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--latents", type=int, nargs="+", default=[512, 3072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(cpu_peers.PEERS))
    parser.add_argument("--images", type=int, default=48, help="`furniture`: number of images")
    parser.add_argument(
        "--add", action="store_true", help="`dit` and `trellis`: add rounds to the recorded ones"
    )
    parser.add_argument("--page-only", action="store_true", help="only the pages, from the JSON")
    options = parser.parse_args()
    here = machine()
    path = RESULTS / f"{here['file']}.json"
    parts = () if options.page_only else options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if set(parts) - {"gemm", "attention"} and options.work is None:
        parser.error("--work DIR is needed for these parts")
    for part in parts:
        if part == "gemm":
            found = gemm(options.rounds)
        elif part == "attention":
            found = attention(options.rounds)
        elif part == "dit":
            earlier = read(path).get("dit", {}) if options.add else {}
            found = {
                str(n): dit(options.work, n, options.rounds, earlier.get(str(n), {}))
                for n in options.latents
            }
        elif part == "guided":
            found = {
                str(n): cpu_guided.measure(options.work, n, options.rounds) for n in options.latents
            }
        elif part == "errors":
            found = errors(options.work)
        elif part == "breakdown":
            found = breakdown(options.work, options.latents[0], options.rounds)
        elif part == "memory":
            found = memory(options.work)
        elif part == "trellis":
            earlier = read(path).get("trellis", {}) if options.add else {}
            found = cpu_trellis.measure(options.work, options.rounds, earlier)
        elif part == "furniture":
            found = cpu_furniture.measure(options.work, options.images)
        else:
            prepare(options.work)
            names = options.peers.split(",")
            found = {name: cpu_peers.measure(name, options.work, options.rounds) for name in names}
        # Read again: another process may have recorded a part in the meantime.
        results = read(path)
        results["machine"] = here
        kept = results.get(part, {}) if part in ("dit", "guided", "peers") else {}
        results[part] = kept | found
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    cpu_page.write([read(path) for path in sorted(RESULTS.glob("*.json"))])


if __name__ == "__main__":
    main()
