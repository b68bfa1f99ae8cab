"""Lazy loading of networks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

from vitapack.runtime.loading.memory import return_memory
from vitapack.runtime.loading.prefetch import prefetch

T = TypeVar("T")


class Lazy(Generic[T]):
    """A network that is loaded on first use and can be freed again.

    Calling it returns the network. nbytes: size of its weights; working_bytes: predicted working
    memory of one call, weights excluded.
    """

    def __init__(self, load: Callable[[], T], nbytes: int, working_bytes: int = 0) -> None:
        self._load: Callable[[], T] | None = load
        self._pending: Callable[[], T] | None = None
        self._network: T | None = None
        self.nbytes, self.working_bytes = nbytes, working_bytes

    def __call__(self) -> T:
        if self._network is None:
            load, self._pending = self._pending or self._load, None
            assert load is not None
            self._network = load()
        return self._network

    def prefetch(self, device: str) -> None:
        """Starts loading on a background thread (prefetch.py).

        The next call waits for the thread, and raises the error if loading failed.
        """
        if self._network is None and self._pending is None and self._load is not None:
            self._pending = prefetch(self._load, device)

    @property
    def loaded(self) -> bool:
        return self._network is not None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the loaded network for worker processes: a loader cannot be pickled."""
        return vars(self) | {"_load": None, "_pending": None, "_network": self()}

    def free(self) -> None:
        """Frees the network; the next call loads it again. No effect on an unpickled copy."""
        if self._load is None:
            return
        if self._pending is not None:
            with suppress(Exception):
                self._pending()
        self._network = self._pending = None
        gc.collect()
        return_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
