"""Progress and cancellation of long work, for a terminal, a server, a notebook and a node alike.

    control = Control(progress=print)
    threading.Timer(5, control.cancel).start()
    mesh = pipeline(image, control=control)     # raises Cancelled after five seconds

Whoever starts the work makes a `Control` and may call `cancel` from any thread. The work checks it
before every step of every phase and raises `Cancelled` itself, at a place where nothing is half
done: no file has its final name, a resumable job goes on when it is started again, a pipeline makes
the next mesh as if nothing had happened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """The state of one phase. `total` may grow while a phase learns how much it has to do."""

    phase: str  # such as "denoise", "decode", "compress"
    done: int
    total: int


class Cancelled(Exception):
    """The work was cancelled by its `Control`. Not a UserError: nobody made a mistake."""


class Flag(Protocol):
    """An event of `threading` or `multiprocessing`."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


class Control:
    """Watches and cancels one piece of work."""

    def __init__(
        self, progress: Callable[[Progress], object] | None = None, flag: Flag | None = None
    ) -> None:
        """`progress` is called in the thread that works. `flag`: an event shared with others, such
        as worker processes; default: a new one."""
        self._progress = progress
        self._flag: Flag = threading.Event() if flag is None else flag

    def cancel(self) -> None:
        self._flag.set()

    @property
    def cancelled(self) -> bool:
        return self._flag.is_set()

    def quiet(self) -> Control:
        """Cancelled together with this one, without progress: for work inside a step."""
        return Control(flag=self._flag)

    def check(self) -> None:
        """Raises Cancelled after `cancel`."""
        if self.cancelled:
            raise Cancelled("cancelled")

    def report(self, phase: str, done: int, total: int) -> None:
        """Tells the caller about finished work; never raises Cancelled."""
        if self._progress is not None:
            self._progress(Progress(phase, done, total))

    def step(self, phase: str, done: int, total: int) -> None:
        """`check`, then `report`: what a loop calls before each of its steps."""
        self.check()
        self.report(phase, done, total)
