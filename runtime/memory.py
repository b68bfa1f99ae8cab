"""What a phase takes: seconds, and the peak of memory while it ran.

    meter = PhaseMeter({"decode": 900_000_000}, "cuda:0")
    with meter("decode"): ...
    meter.bytes["decode"]    # {"predicted": ..., "peak": ..., "reserved": None}

On Linux the kernel's own high-water mark of the process is reset at the start of each phase, so the
figure holds everything: weights, activations, the allocator's holes. On a CUDA device it is torch's
peak of memory allocated there, and of memory reserved for it, instead.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGE = 1 << 20
KEPT = 32 << 20  # glibc's own limit, to which it raises the threshold as large blocks are freed

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(peak: bool = False) -> int | None:
    """Bytes of the process in memory, now or at most since the last reset; None off Linux."""
    try:
        text = STATUS.read_text()
    except OSError:
        return None
    field = "VmHWM:" if peak else "VmRSS:"
    return int(text.split(field)[1].split()[0]) * 1024 if field in text else None


def reset_peak() -> None:
    """Lets `resident(peak=True)` start anew; without effect where the kernel does not allow it."""
    try:
        RESET.write_text("5")
    except OSError:
        return


def return_memory() -> None:
    """Gives freed memory back to the system (glibc keeps it otherwise; elsewhere a no-op)."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def keep_no_holes() -> None:
    """From now on every block of 1 MiB and more is the system's own and goes back when freed.

    For the whole process. glibc raises that limit to 32 MiB by itself as blocks are freed: a packed
    2mini's lean run then held 3.3 GB where its largest network takes 1.15 GB. Holes that are there
    already go on being filled.
    """
    _blocks_of_its_own(LARGE)


def keep_holes() -> None:
    """Takes `keep_no_holes` back, for code that asks for the same blocks again and again: a step of
    2mini's original in float32 takes 6.2 instead of 7.1 s (n = 3, two cores)."""
    _blocks_of_its_own(KEPT)


def _blocks_of_its_own(least: int) -> None:
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, least)
        libc.mallopt(_TRIM_THRESHOLD, 2 * least)  # as glibc itself has them


@functools.cache  # find_library starts a process, and a lean run asks after every phase
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    libc = ctypes.CDLL(name) if name else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") else None


class PhaseMeter:
    """Seconds and bytes by phase: predicted, peak, and what torch reserved on a GPU."""

    def __init__(self, predicted: Mapping[str, int], device: str = "cpu") -> None:
        self.predicted, self.device = predicted, device
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, dict[str, int | None]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        import torch

        gpu = torch.device(self.device).type == "cuda"
        if gpu:
            torch.cuda.init()  # the first phase comes before any tensor, and without statistics
            torch.cuda.reset_peak_memory_stats(self.device)
        reset_peak()
        start = time.perf_counter()
        try:
            yield
        finally:  # a phase that fails was measured as well
            self.seconds[phase] = time.perf_counter() - start
            self.bytes[phase] = {
                "predicted": self.predicted.get(phase),
                "peak": torch.cuda.max_memory_allocated(self.device)
                if gpu
                else resident(peak=True),
                "reserved": torch.cuda.max_memory_reserved(self.device) if gpu else None,
            }


def memory_words(found: Mapping[str, int | None]) -> str:
    """A phase's bytes for people, as the end of a line; nothing where no peak is known."""
    if not found["peak"]:
        return ""
    predicted, reserved = found["predicted"], found["reserved"]
    words = f" (predicted {predicted / 2**30:.2f})" if predicted else ""
    words += f", reserved {reserved / 2**30:.2f}" if reserved else ""
    return f", peak {found['peak'] / 2**30:.2f} GiB{words}"
