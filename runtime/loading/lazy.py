"""A network that is loaded on first use and can be freed again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from vitapack.runtime.loading.memory import return_memory
from vitapack.runtime.loading.prefetch import ahead

if TYPE_CHECKING:  # families build their parts with this module
    pass


T = TypeVar("T")


class Part(Generic[T]):
    """A network that is loaded on first use and can be freed again.

    `nbytes` of weights, `working_bytes` of what a call holds beside them (see activations.py).
    """

    def __init__(self, load: Callable[[], T], nbytes: int, working_bytes: int = 0) -> None:
        self._load: Callable[[], T] | None = load
        self._coming: Callable[[], T] | None = None
        self._network: T | None = None
        self.nbytes, self.working_bytes = nbytes, working_bytes

    def __call__(self) -> T:
        if self._network is None:
            load, self._coming = self._coming or self._load, None
            assert load is not None
            self._network = load()
        return self._network

    def begin(self, device: str) -> None:
        """Has it loaded beside other work (ahead.py); calling it waits for that, and raises what
        went wrong."""
        if self._network is None and self._coming is None and self._load is not None:
            self._coming = ahead(self._load, device)

    @property
    def loaded(self) -> bool:
        return self._network is not None

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: the network itself, since a loader cannot travel."""
        return vars(self) | {"_load": None, "_coming": None, "_network": self()}

    def free(self) -> None:
        if self._load is None:
            return
        if self._coming is not None:
            with suppress(Exception):
                self._coming()
        self._network = self._coming = None
        gc.collect()
        return_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
