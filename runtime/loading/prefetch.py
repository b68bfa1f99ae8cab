"""The next phase's network comes while a phase computes, on a thread and a CUDA stream of its own.

    network = ahead(load, "cuda")   # begins
    ...                             # the phase before computes
    network()                       # waits for the thread, and lets the GPU wait for the copies

Reading and checking tensors leaves Python's lock to others, and copies on a stream of their own
wait for no kernel, so a phase that keeps a GPU busy hides all of it. Never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def ahead(load: Callable[[], T], device: str = "cpu") -> Callable[[], T]:
    """Begins `load()`; what is returned gives its result once it is there, or raises its error.

    Its copies wait for what the device has been given so far: the memory that they fill may have
    been a network's that is gone here and still computes there.
    """
    stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> T:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return load()

    thread = ThreadPoolExecutor(1, "vitapack-ahead")
    coming = thread.submit(run)
    thread.shutdown(wait=False)  # it ends with its work

    def result() -> T:
        network = coming.result()
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        return network

    return result
