"""Bytes of the tensors that are alive together while a network runs, on any device."""

import gc
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """The peak of bytes in storages that were made meanwhile and are still held."""

    def __init__(self, inside=None):
        """`inside`: implementations of operators by name, of which one looks inside too."""
        super().__init__()
        self.inside = inside or {}
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitapack" and func._opname in self.inside:
            with self:
                out = self.inside[func._opname](*args)
            gc.collect()  # Triton's interpreter leaves cycles that hold a kernel's tensors
            return out
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, count = storage._cdata, storage.nbytes()
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += count
                    weakref.finalize(storage, self.gone, key, count)
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, count):
        self.known.discard(key)
        self.now -= count


def peak(call, *given, inside=None):
    gc.freeze()  # so that collecting takes no time
    with torch.inference_mode(), Alive(inside) as alive:
        call(*given)
    gc.unfreeze()
    return alive.peak + sum(tensor.nbytes for tensor in given)
