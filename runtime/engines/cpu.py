"""What the networks on the CPU's int8 engine share (cpu_dit.py, cpu_flow.py).

`load_dit(..., compute="a8")` returns such a network, called like any other. Its modules are the
same with the same parameters; only the order of the arithmetic differs (csrc/int8/blocks.h). A call
computes in memory that is planned once for its shape: beside its output nothing is allocated that
grows with the tokens (but TRELLIS' latent cube as patches). What the engine cannot take, a block
with 16-bit linears or a call that needs gradients, runs in the readable form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.kernels.linear.support import cpu_engine
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation

ROWS = 192  # rows of a block that a thread takes at a time (csrc/int8/blocks.h)


class Scratch:
    """The plans of a model and its copies: memory for two shapes, for one caller.

    Two, because a DiT's guided step is a call with the picture's tokens and one with a single one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.plans: list[Any] = []  # the one used last comes last

    def plan_for(self, make: Callable[..., Any], *key: int) -> Any:
        plan = next((plan for plan in self.plans if plan.key == key), None)
        if plan is None:
            del self.plans[:-1]  # the old shape's memory goes before the new one's comes
            plan = make(*key)
        else:
            self.plans.remove(plan)
        self.plans.append(plan)
        return plan

    @property
    def plan(self) -> Any:
        """Of the last call; None before the first."""
        return self.plans[-1] if self.plans else None

    @property
    def nbytes(self) -> int:
        return sum(int(plan.nbytes) for plan in self.plans)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()


def runs_fused(x: Tensor, cond: Tensor | Condition) -> bool:
    """Whether the engine takes a call: on a CPU, without gradients, and built."""
    needs_gradients = torch.is_grad_enabled() and (
        x.requires_grad or Condition.of(cond).tokens.requires_grad
    )
    return x.device.type == "cpu" and not needs_gradients and cpu_engine("int8 a8 DiT")


def takes(linears: Iterable[nn.Module]) -> bool:
    """Whether all linears of a block are the engine's and compute on int8 activations."""
    return all(isinstance(linear, CpuLinear) and linear.compute == "a8" for linear in linears)


def dense(linear: nn.Linear) -> Any:
    """A linear that is kept in float, as the engine reads it."""
    from vitapack.kernels.linear.cpu_plans import Dense

    return Dense(linear.weight.detach(), None if linear.bias is None else plain(linear.bias))


def modulation_rows(modulation: Any, step: StepModulation) -> Tensor:
    """Modulation as the engine reads it: (B or 1, chunks * h) float32."""
    if hasattr(modulation, "table"):
        return modulation.table[step.rows].float().contiguous()
    return modulation.lin(step.vector).float().contiguous()


def plain(values: Tensor) -> Tensor:
    """As the engine reads parameters: contiguous float32."""
    return values.detach().float().contiguous()


def stream_weights(attention: Any, mlp: Any) -> Any:
    """Self-attention and MLP of one stream of tokens."""
    from vitapack.kernels.linear.cpu_plans import StreamWeights

    return StreamWeights(
        attention.qkv.panels,
        plain(attention.norm.query_norm.scale),
        plain(attention.norm.key_norm.scale),
        proj=attention.proj.panels,
        up=mlp[0].panels,
        down=mlp[2].panels,
    )
