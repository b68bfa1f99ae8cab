"""Micro-benchmarks under pytest-benchmark, compared with the last saved run on this processor.

    make bench                           # all: about a minute
    python -m benchmarks.micro -k emd    # some: pytest's options follow

Each bench_*.py times one part of the tree. Runs are saved in .benchmarks, one folder a processor;
git ignores them, since they tell of one machine on one day. Published figures are made by the other
folders of benchmarks/. The test run never collects these files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu.run import machine

ROOT = Path(__file__).resolve().parents[2]


def main(options: list[str]) -> int:
    here = machine()
    storage = ROOT / ".benchmarks" / f"{here['file']}-{here['cores']}-cores"
    earlier = saved(storage)
    code = pytest.main([
        str(Path(__file__).parent), "-o", "python_files=bench_*.py",
        "-o", "python_functions=bench_*", "-p", "no:cacheprovider",
        f"--benchmark-storage={storage.as_uri()}", "--benchmark-autosave",
        "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname",
        "--benchmark-disable-gc", "--benchmark-warmup=on", "--benchmark-warmup-iterations=2",
        *options,
    ])  # fmt: skip
    if new := saved(storage)[len(earlier) :]:
        print("\n".join(ratios(new[-1], earlier)))
    return int(code)


def saved(storage: Path) -> list[Path]:
    """Files of all runs on this processor, the oldest first."""
    return sorted(storage.rglob("*.json"), key=lambda path: path.name)


def ratios(now: Path, earlier: list[Path]) -> list[str]:
    """Lines of a table: each benchmark's median, and its ratio to the last run that has it."""
    before: dict[str, tuple[float, str]] = {}
    for path in earlier:
        before |= {name: (median, path.stem[:4]) for name, median in medians(path).items()}
    lines = [f"{'benchmark':50s} {'median':>14s}  ratio to the last saved run"]
    for name, median in medians(now).items():
        ratio = f"{median / before[name][0]:.2f} (run {before[name][1]})" if name in before else "-"
        lines.append(f"{name:50s} {1e6 * median:>11,.0f} us  {ratio}")
    return lines


def medians(path: Path) -> dict[str, float]:
    """Seconds of each benchmark in a saved run."""
    run: dict[str, Any] = json.loads(path.read_text())
    return {bench["name"]: bench["stats"]["median"] for bench in run["benchmarks"]}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
