"""Loads the next phase's network on a background thread and CUDA stream during the current phase.

    network = prefetch(load, "cuda")   # starts loading
    ...                                # the current phase computes
    network()                          # waits for the thread; the GPU waits for the copies

Reading and checking tensors releases Python's lock, and copies on a separate stream wait for no
kernel, so a phase that keeps the GPU busy hides all of it. Compiled, not timed: it has never run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def prefetch(load: Callable[[], T], device: str = "cpu") -> Callable[[], T]:
    """Starts `load()`; the returned function waits for its result, or raises its error.

    Copies to the device wait for the work queued so far: they may reuse the memory of a network
    that was freed on the host while the GPU still computes with it.
    """
    stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> T:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return load()

    thread = ThreadPoolExecutor(1, "vitapack-prefetch")
    pending = thread.submit(run)
    thread.shutdown(wait=False)  # the thread ends after `run`

    def result() -> T:
        network = pending.result()
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        return network

    return result
