"""Memory and seconds of a generation's phases, predicted and measured.

    weights = {"condition": ..., "denoise": ..., "decode": ...}    # bytes
    predicted, prefetching = peaks(base, weights, working, lean=True, ahead=False)
    meter = PhaseMeter(predicted, "cuda:0")
    with meter("denoise"): ...
    meter.bytes["denoise"]    # {"predicted": ..., "peak": ..., "reserved": None}

On a CPU the peak is that of the process (loading/memory.py), reset at the start of each phase; on a
GPU, torch's peaks of allocated and of reserved memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch

from vitapack.runtime.loading.memory import reset_peak, resident


def peaks(
    base: int, weights: Mapping[str, int], working: Mapping[str, int], *, lean: bool, ahead: bool
) -> tuple[dict[str, int], set[str]]:
    """Peak memory of each phase, and the phases that prefetch the next network.

    weights, working: bytes of each phase's network and its working memory, in the phases' order.
    lean: each network is evicted after its phase. ahead: the next network is prefetched during each
    phase in which that does not raise the run's largest peak.
    """
    predicted, kept = {}, 0
    for phase, nbytes in weights.items():
        kept = nbytes if lean else kept + nbytes
        predicted[phase] = base + kept + working[phase]
    largest, prefetching = max(predicted.values()), set()
    for phase, following in pairwise(weights) if ahead else ():
        if predicted[phase] + weights[following] <= largest:
            predicted[phase] += weights[following]
            prefetching.add(phase)
    return predicted, prefetching


class PhaseMeter:
    """Seconds and bytes by phase: predicted, peak, and what torch reserved on a GPU."""

    def __init__(self, predicted: Mapping[str, int], device: str = "cpu") -> None:
        self.predicted, self.device = predicted, device
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, dict[str, int | None]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        gpu = torch.device(self.device).type == "cuda"
        if gpu:
            torch.cuda.init()  # before the first tensor there are no statistics to reset
            torch.cuda.reset_peak_memory_stats(self.device)
        reset_peak()
        start = time.perf_counter()
        try:
            yield
        finally:  # also measures a phase that fails
            self.seconds[phase] = time.perf_counter() - start
            self.bytes[phase] = {
                "predicted": self.predicted.get(phase),
                "peak": torch.cuda.max_memory_allocated(self.device)
                if gpu
                else resident(peak=True),
                "reserved": torch.cuda.max_memory_reserved(self.device) if gpu else None,
            }


def memory_words(found: Mapping[str, int | None]) -> str:
    """A phase's memory as the end of a log line; empty if no peak is known."""
    if not found["peak"]:
        return ""
    predicted, reserved = found["predicted"], found["reserved"]
    words = f" (predicted {predicted / 2**30:.2f})" if predicted else ""
    words += f", reserved {reserved / 2**30:.2f}" if reserved else ""
    return f", peak {found['peak'] / 2**30:.2f} GiB{words}"
