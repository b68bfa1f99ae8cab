"""Progress and cancellation of long work, for terminals, servers, notebooks and nodes alike.

    control = Control(progress=print)
    threading.Timer(5, control.cancel).start()
    mesh = pipeline(image, control=control)     # raises Cancelled after five seconds

The caller makes a `Control` and may call `cancel` from any thread. The work checks it before every
step of every phase and raises `Cancelled` at a point where no state is left inconsistent: no
incomplete file has its final name, a resumable job can be restarted, a pipeline stays usable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """The state of one phase. `total` may grow while a phase runs."""

    phase: str  # such as "denoise", "decode", "compress"
    done: int
    total: int


class Cancelled(Exception):
    """The work was cancelled by its `Control`. Not a UserError, since it is no mistake."""


class Flag(Protocol):
    """An event of `threading` or `multiprocessing`."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...


class Control:
    """Reports the progress of one piece of work, and cancels it."""

    def __init__(
        self, progress: Callable[[Progress], object] | None = None, flag: Flag | None = None
    ) -> None:
        """`progress` is called in the working thread. `flag`: an event shared with others, such as
        worker processes; default: a new one."""
        self._progress = progress
        self._flag: Flag = threading.Event() if flag is None else flag

    def cancel(self) -> None:
        self._flag.set()

    @property
    def cancelled(self) -> bool:
        return self._flag.is_set()

    def quiet(self) -> Control:
        """A control that is cancelled with this one and reports nothing: for work inside a step."""
        return Control(flag=self._flag)

    def check(self) -> None:
        """Raises Cancelled after `cancel`."""
        if self.cancelled:
            raise Cancelled("cancelled")

    def report(self, phase: str, done: int, total: int) -> None:
        """Reports finished work to the caller; never raises Cancelled."""
        if self._progress is not None:
            self._progress(Progress(phase, done, total))

    def step(self, phase: str, done: int, total: int) -> None:
        """`check`, then `report`; call it before each step of a loop."""
        self.check()
        self.report(phase, done, total)
