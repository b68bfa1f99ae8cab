"""Cancels a network's forward pass between its layers.

with cancellable(encoder, control):
    encoder(pixels)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vitapack.runtime.progress import Control


@contextmanager
def cancellable(network: nn.Module, control: Control) -> Iterator[None]:
    """Checks `control` before each module of the network: on a CPU one forward pass of DINOv2-giant
    takes 10 s and more. For calls in one thread at a time. Raises Cancelled."""
    hooks = [
        module.register_forward_pre_hook(lambda *_: control.check()) for module in network.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
