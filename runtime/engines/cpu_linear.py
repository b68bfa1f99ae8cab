"""The packed linear on CPUs, with its weight held only in the int8 engine's order.

    linear = linear_for(weight, bias, "a8", execution.path)
    linear(x)

It is made during loading, one weight at a time, so that no weight is held twice. forward has no
side effects, so threads may share a module, and copies share its memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitapack.kernels.linear import cpu, support
from vitapack.kernels.linear.weights import PackedWeight
from vitapack.runtime.errors import UserError
from vitapack.runtime.networks.linear import PackedLinear


class CpuLinear(PackedLinear):
    """A PackedLinear on the int8 engine.

    Calls that need gradients of x run in plain PyTorch on the exact integers, unpacked for the
    call; to train, load the network on the plain path. state_dict and pickles hold the packed
    file's tensors. float() and half() have no effect. Moving to another device raises UserError.
    torch.compile breaks its graph at this module and runs the engine.
    """

    panels: cpu.Panels

    def hold(self, weight: PackedWeight, bias: Tensor | None) -> None:
        self.panels = cpu.pack(weight, bias)
        self.floats = torch.float32 if bias is None else bias.dtype

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.panels.bias  # float32, which holds 16 bits exactly
        return None if bias is None else bias[: self.out_features].to(self.floats)

    def packed(self) -> PackedWeight:
        """The weight in its layout: a copy of the same size."""
        return self.panels.unpacked()[0]

    def multiply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return super().multiply(x)
        run = cpu.linear_a8 if self.compute == "a8" else cpu.linear_a16
        return run(x, self.panels)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CpuLinear:
        if (device := fn(torch.empty(1)).device).type != "cpu":
            raise UserError(
                f"this network's weights are in the CPU engine's order and cannot move to "
                f"{device}: load it there, with device={str(device)!r}"
            )
        return self

    def _names(self) -> list[str]:
        return [*self.layout.names, *(["bias"] if self.bias is not None else [])]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        held = {**self.packed().tensors, "bias": self.bias}
        destination |= {f"{prefix}{name}": held[name] for name in self._names()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        names, (_, _, missing, unexpected, _) = self._names(), rest
        given = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        missing += [prefix + name for name in names if name not in given]
        unexpected += [prefix + name for name in given if name not in names]
        if given and not unexpected:
            held = {**self.packed().tensors, "bias": self.bias, **given}
            bias = held.pop("bias")
            self.hold(PackedWeight(self.layout, held, self.in_features), bias)


def linear_for(weight: PackedWeight, bias: Tensor | None, compute: str, path: str) -> PackedLinear:
    """Makes the packed linear of an execution path.

    On "cpu-int8" a CpuLinear, or with a warning a PackedLinear if the engine does not support the
    weight's layout; on other paths a PackedLinear.
    """
    if path != "cpu-int8":
        return PackedLinear(weight, bias, compute)
    layout = weight.layout
    if cpu.serves(layout):
        return CpuLinear(weight, bias, compute)
    reason = f"the int8 engine does not read layout {layout.id}; slow"
    layer = f"{layout.name} {compute} linear"
    support.announce(layer, "cpu", "plain PyTorch", reason, logging.WARNING)
    return PackedLinear(weight, bias, compute)
