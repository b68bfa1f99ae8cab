"""The process' memory: how much it holds, how much at most, and how it gives back what it freed.

On Linux the kernel's own high-water mark is read and reset, so the figures hold everything:
weights, activations, the allocator's holes. Elsewhere they are None and the rest has no effect.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGE = 1 << 20
KEPT = 32 << 20  # glibc's own limit, to which it raises the threshold as large blocks are freed

_least = KEPT  # what is asked for now

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


@contextmanager
def holes_kept() -> Iterator[None]:
    """`keep_holes` for a while, and what was before. A point of 2mini's shape decoder, asked for
    1000 at a time, takes 91 instead of 109 us, with as much memory (n = 3, two cores)."""
    before = _least
    keep_holes()
    try:
        yield
    finally:
        _blocks_of_its_own(before)
        return_memory()


def _blocks_of_its_own(least: int) -> None:
    global _least
    _least = least
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, least)
        libc.mallopt(_TRIM_THRESHOLD, 2 * least)  # as glibc itself has them


@functools.cache  # find_library starts a process, and a lean run asks after every phase
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    libc = ctypes.CDLL(name) if name else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") else None
