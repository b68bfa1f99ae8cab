"""Shared by the networks on the CPU's int8 engine (cpu_dit.py, cpu_flow.py).

`load_dit(..., compute="a8")` returns such a network, called like any other. Its modules and
parameters are the same; only the order of the arithmetic differs (csrc/int8/blocks.h). A call
computes in memory that is laid out once for its shape: apart from its output (and TRELLIS' latent
cube as patches), it allocates nothing that grows with the number of tokens. Blocks with 16-bit
linears and calls that need gradients run in the readable form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from vitapack.kernels.linear.support import cpu_engine
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.networks.blocks import Condition, needs_gradients
from vitapack.runtime.networks.modulation import StepModulation

ROWS = 192  # rows that a thread computes at a time (csrc/int8/blocks.h)


class Scratch:
    """Working memory of a network and of copies that share its weights: two shapes, one caller.

    Two, because a DiT's guided step is one call with all condition tokens and one with one token.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.plans: list[Any] = []  # most recently used last

    def plan_for(self, make: Callable[..., Any], *key: int) -> Any:
        """The memory for the shape `key`: one of the last two, or newly made by make(*key)."""
        plan = next((plan for plan in self.plans if plan.key == key), None)
        if plan is None:
            del self.plans[:-1]  # free the oldest shape's memory before allocating
            plan = make(*key)
        else:
            self.plans.remove(plan)
        self.plans.append(plan)
        return plan

    @property
    def plan(self) -> Any:
        """The memory of the last call; None before the first."""
        return self.plans[-1] if self.plans else None

    @property
    def nbytes(self) -> int:
        return sum(int(plan.nbytes) for plan in self.plans)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()


def runs_fused(x: Tensor, condition: Condition) -> bool:
    """Whether a call can run on the engine: on a CPU, without gradients, and compiled."""
    on_cpu = x.device.type == "cpu"
    return on_cpu and not needs_gradients(x, condition) and cpu_engine("int8 a8 DiT")


def takes(linears: Iterable[nn.Module]) -> bool:
    """Whether all these linears run on the engine with int8 activations."""
    return all(isinstance(linear, CpuLinear) and linear.compute == "a8" for linear in linears)


def dense(linear: nn.Linear) -> Any:
    """A float linear in the engine's form."""
    from vitapack.kernels.linear.cpu_plans import Dense

    return Dense(linear.weight.detach(), None if linear.bias is None else plain(linear.bias))


def modulation_rows(modulation: Any, step: StepModulation) -> Tensor:
    """Modulation in the engine's form: (B or 1, chunks * h), contiguous float32."""
    if hasattr(modulation, "table"):
        return modulation.table[step.rows].float().contiguous()
    return modulation.lin(step.vector).float().contiguous()


def plain(values: Tensor) -> Tensor:
    """A parameter in the engine's form: contiguous float32."""
    return values.detach().float().contiguous()


def stream_weights(attention: Any, mlp: Any) -> Any:
    """Weights of self-attention and MLP of one token stream, in the engine's form."""
    from vitapack.kernels.linear.cpu_plans import StreamWeights

    return StreamWeights(
        attention.qkv.panels,
        plain(attention.norm.query_norm.scale),
        plain(attention.norm.key_norm.scale),
        proj=attention.proj.panels,
        up=mlp[0].panels,
        down=mlp[2].panels,
    )
