"""Interleaved timing of runs that are compared, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from vitapack.kernels.linear import cpu

Run = Callable[[], Any]


def interleaved(
    runs: dict[str, Run], rounds: int, warm: bool = True, repeats: int = 1
) -> dict[str, float]:
    """Median seconds of each run, interleaved so that a slow period of the machine affects all."""
    times = all_times(runs, rounds, warm, repeats)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def all_times(
    runs: dict[str, Run], rounds: int, warm: bool = True, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds per call of every round.

    Each measurement of `repeats` calls starts after a pause: OpenMP's threads spin for some
    milliseconds after a call, on cores that the next one needs.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if warm:
        for run in runs.values():
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.05)
            started = time.perf_counter()
            for _ in range(repeats):
                run()
            times[name].append((time.perf_counter() - started) / repeats)
    return times


def register_dots(seconds: float) -> tuple[Run, float]:
    """A loop of dot products on registers that takes about `seconds`, and its 1e9 operations.

    It measures the int8 peak of the instruction set in use. Interleave it with the runs that are
    compared with the peak, since the machine's speed drifts by a tenth.
    """

    def run() -> float:
        return 1e-9 * cpu.built().int8_peak(int(seconds * 5e8), torch.get_num_threads())

    return run, run()
