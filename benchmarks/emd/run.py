"""Compares the EMD solver with POT and scipy: measures into JSON, then writes docs/emd.md's tables.

    python -m benchmarks.emd                        # about 3 minutes
    python -m benchmarks.emd --parts cuda           # only the CUDA kernels' compile report
    python -m benchmarks.emd --page-only            # only docs/emd.md, from the JSON

Parts: `table` (POT, scipy, vitapack), `hard` (clouds that slow solvers down), `large` (N=100,000),
`batch` (threads), `floor` (sampling floor; no times) and `cuda` (registers and spills; needs nvcc).
Times are CPU seconds of one thread, medians of n runs; POT's and scipy's include their cost matrix,
which vitapack does not need. Each measurement runs in its own process; its memory is the peak minus
the memory before the call. `similar` is a chair against the same chair rotated by 6 degrees with
thicker legs, `different` the chair against a torus. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emd import page as emd_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "emd.json"
PARTS = ("table", "hard", "large", "batch", "floor", "cuda")
GAPS = (1e-2, 1e-3, 1e-4)
SIZES = (1000, 10_000)
LARGE = 100_000
ARCHITECTURES = ("80", "86", "89", "90")
SCIPY_LARGEST = 2000  # 1.3 CPU s at 2k, minutes at 10k
Mesh = tuple[np.ndarray, np.ndarray]


def box(low: tuple[float, ...], high: tuple[float, ...]) -> Mesh:
    """The 8 corners and 12 triangles of a box."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    sides = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    faces = [triangle for a, b, c, d in sides for triangle in ((a, b, c), (a, c, d))]
    return np.where(corners == 0, low, high).astype(float), np.array(faces)


def join(parts: list[Mesh]) -> Mesh:
    starts = np.cumsum([0, *[len(vertices) for vertices, _ in parts]])
    faces = [faces + start for (_, faces), start in zip(parts, starts[:-1], strict=True)]
    return np.concatenate([vertices for vertices, _ in parts]), np.concatenate(faces)


def chair(leg: float) -> Mesh:
    """A seat, a back and four legs of half width `leg`, within [-1, 1]."""
    parts = [box((-0.5, -0.5, -0.05), (0.5, 0.5, 0.05)), box((-0.5, 0.42, 0.05), (0.5, 0.5, 1.0))]
    for x in (-0.45, 0.45):
        for y in (-0.45, 0.45):
            parts.append(box((x - leg, y - leg, -0.95), (x + leg, y + leg, -0.05)))
    return join(parts)


def torus(rings: int = 96, sides: int = 48) -> Mesh:
    """A torus of radii 0.7 and 0.25."""
    u, v = np.meshgrid(np.arange(rings), np.arange(sides), indexing="ij")
    a, b = 2 * np.pi * u.ravel() / rings, 2 * np.pi * v.ravel() / sides
    radius = 0.7 + 0.25 * np.cos(b)
    vertices = np.c_[radius * np.cos(a), radius * np.sin(a), 0.25 * np.sin(b)]

    def at(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return ((i % rings) * sides + j % sides).ravel()

    corners = at(u, v), at(u + 1, v), at(u + 1, v + 1), at(u, v + 1)
    faces = np.concatenate([np.stack(corners[:3], 1), np.stack((corners[0], *corners[2:]), 1)])
    return vertices, faces


def pair(name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two clouds of n points (n, 3), float32, sampled independently and not stratified."""
    from vitapack.kernels.emd.solve import sample_surface

    def sample(mesh: Mesh, number: int) -> np.ndarray:
        return sample_surface(*mesh, n, seed=2 * seed + number, stratified=False)

    x = sample(chair(0.06), 0)
    if name == "different":
        return x.astype(np.float32), sample(torus(), 1).astype(np.float32)
    c, s = np.cos(np.pi / 30), np.sin(np.pi / 30)
    turned = sample(chair(0.09), 1) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T
    return x.astype(np.float32), turned.astype(np.float32)


def solve(solver: str, x: np.ndarray, y: np.ndarray, gap: float, p: int = 1) -> dict[str, Any]:
    """Runs one solver once: its distance, and for vitapack gap, bids and phases."""
    if solver == "vitapack":
        from vitapack.kernels.emd.solve import emd

        found = emd(x, y, gap=gap, p=p, threads=1)
        return {
            "distance": float(found.distance),
            "certified_gap": float(found.gap),
            "bids_a_point": int(found.bids) / len(x),
            "phases": int(found.phases),
        }
    from scipy.spatial.distance import cdist

    cost = cdist(x.astype(np.float64), y.astype(np.float64))
    if solver == "pot":
        import ot

        weights = np.full(len(x), 1 / len(x))
        return {"distance": float(ot.emd2(weights, weights, cost, numItermax=10**8))}
    from scipy.optimize import linear_sum_assignment

    return {"distance": float(cost[linear_sum_assignment(cost)].mean())}


def timed(
    run: Callable[[], dict[str, Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """The result of the last run, with the median time of all."""
    times, found = [], {}
    for _ in range(repeats):
        started = clock()
        found = run()
        times.append(clock() - started)
    return found | {"seconds": statistics.median(times), "n_runs": repeats}


def memory(key: str) -> float:
    """VmRSS (now) or VmHWM (peak since `reset_peak`) in MiB; Linux only."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job; the process runs nothing else."""
    if job["part"] == "hard":
        return measure_hard(job)
    if job["part"] == "batch":
        return measure_batch(job)
    x, y = pair(job["pair"], job["n"])
    gap, p = job["gap"] or 0.0, job.get("p", 1)
    solve(job["solver"], x[:64].copy(), y[:64].copy(), 1e-2)  # imports and first-call work
    reset_peak()
    before = memory("VmRSS")
    found = timed(lambda: solve(job["solver"], x, y, gap, p), job["repeats"], time.process_time)
    return job | found | {"peak_mib": memory("VmHWM") - before}


def measure_hard(job: dict[str, Any]) -> dict[str, Any]:
    """The tests' hard clouds, at the job's larger size."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from emd_clouds import hard_pairs  # type: ignore[import-not-found]

    rows = []
    for name, (x, y) in hard_pairs(job["n"]).items():
        found = timed(
            lambda x=x, y=y: solve("vitapack", x, y, job["gap"]), job["repeats"], time.process_time
        )
        rows.append({"cloud": name} | found)
    return job | {"rows": rows}


def measure_batch(job: dict[str, Any]) -> dict[str, Any]:
    """Wall seconds of a batch of different pairs, with one thread and with two."""
    from vitapack.kernels.emd.solve import emd

    clouds = [pair(job["pair"], job["n"], seed) for seed in range(job["pairs"])]
    x, y = (np.stack([cloud[side] for cloud in clouds]) for side in (0, 1))

    def run(threads: int) -> float:
        def work() -> dict[str, Any]:
            emd(x, y, gap=job["gap"], threads=threads)
            return {}

        return timed(work, 1, time.perf_counter)["seconds"]

    walls = [(run(1), run(2)) for _ in range(job["repeats"])]  # interleaved: speed may drift
    one, two = (statistics.median(wall) for wall in zip(*walls, strict=True))
    return job | {"wall_s_one_thread": one, "wall_s_two_threads": two, "speedup": one / two}


def run_floor() -> dict[str, Any]:
    """EMD between independent samplings of one surface, uniform and stratified."""
    from vitapack.kernels.emd.solve import emd_floor, sample_surface

    rows = []
    for name, mesh in (("chair", chair(0.06)), ("torus", torus())):
        for n in (2500, 10_000):
            row: dict[str, Any] = {"shape": name, "n": n, "draws": 3}
            for kind, stratified in (("random", False), ("stratified", True)):
                clouds = [
                    sample_surface(*mesh, n, seed=seed, stratified=stratified) for seed in range(4)
                ]
                row[kind] = emd_floor(clouds[0], np.stack(clouds[1:])).mean
            rows.append(row)
    return {"rows": rows}


def in_a_process(**job: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.emd", "--job", json.dumps(job)]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    out = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | single
    )
    return json.loads(out.stdout.splitlines()[-1])


def run_table() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for n in SIZES:
        for name in ("similar", "different"):
            base = {"part": "table", "pair": name, "n": n}
            few = 1 if n > SCIPY_LARGEST else 5  # POT takes half a minute and 3.9 GB at 10k
            pot = in_a_process(**base, solver="pot", gap=None, repeats=few)
            group = [pot]
            if n <= SCIPY_LARGEST:
                group.append(in_a_process(**base, solver="scipy", gap=None, repeats=few))
            for gap in GAPS:
                group.append(in_a_process(**base, solver="vitapack", gap=gap, repeats=5))
            for row in group:
                row["times_pot"] = pot["seconds"] / row["seconds"]
                row["error"] = row["distance"] / pot["distance"] - 1
                print(emd_page.table_line(row), file=sys.stderr, flush=True)
            squared = in_a_process(**base, solver="vitapack", gap=1e-3, p=2, repeats=5)
            rows += [*group, squared]
    return {"rows": rows}


def compile_report() -> dict[str, Any]:
    """ptxas' report on each CUDA kernel; warnings are errors. Runs no kernel."""
    if shutil.which("nvcc") is None:
        raise SystemExit("no nvcc on PATH; install the CUDA toolkit or leave out the part `cuda`")
    rows = []
    pattern = re.compile(
        r"solveI([fd])Li([12])E.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers.*?(\d+) bytes smem",
        flags=re.DOTALL,
    )
    for arch in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings"]
            command += ["-cubin", f"-arch=sm_{arch}", "-o", f"{folder}/emd.cubin"]
            command += [str(ROOT / "csrc" / "emd" / "auction.cu")]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for entry in text.split("Compiling entry function")[1:]:
            kind, p, *numbers = pattern.search(entry).groups()
            stack, stores, loads, registers, shared = map(int, numbers)
            kernel = f"solve<{'float' if kind == 'f' else 'double'}, {p}>"
            rows.append(
                {
                    "arch": f"sm_{arch}",
                    "kernel": kernel,
                    "registers": registers,
                    "stack_bytes": stack,
                    "spill_bytes": stores + loads,
                    "shared_bytes": shared,
                }
            )
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    return {
        "status": "compiled, not timed",
        "nvcc": release[1] if release else "unknown",
        "kernels": sorted(rows, key=lambda row: (row["kernel"], row["arch"])),
    }


def measured_on() -> dict[str, Any]:
    from vitapack import _C

    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "instruction_set": _C.emd_instruction_sets()[0],
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def run_part(part: str) -> dict[str, Any]:
    if part == "cuda":
        return compile_report()
    if part == "floor":
        return run_floor()
    machine = measured_on()
    if part == "table":
        found = run_table()
    elif part == "large":
        base = {"part": "large", "n": LARGE, "solver": "vitapack", "gap": 1e-2, "repeats": 1}
        found = {"rows": [in_a_process(**base, pair=name) for name in ("similar", "different")]}
    elif part == "hard":
        found = in_a_process(part="hard", n=10_000, gap=1e-2, repeats=3)
    else:
        found = in_a_process(part="batch", pair="similar", n=10_000, pairs=8, gap=1e-3, repeats=3)
    return found | {"machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--page-only", action="store_true", help="only docs/emd.md, from the JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job))))
        return
    report = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not arguments.page_only:
        for part in arguments.parts:
            print(part, file=sys.stderr, flush=True)
            report[part] = run_part(part)
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    emd_page.write(report)
    for part, text in emd_page.texts(report).items():
        if part in arguments.parts:
            print(f"\n{part}: {text}")


if __name__ == "__main__":
    main()
