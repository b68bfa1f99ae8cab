"""What the packed networks share that run on the CPU's int8 engine (`dit_engine.py`,
`flow_engine.py`).

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

from vitapack.kernels.linear import support
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import When


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


class Engine(nn.Module):
    """Comes before the readable network among the bases of its fused form."""

    when: Callable[..., When]  # the readable network's

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scratch = Scratch()

    def prepare(self) -> None:
        """Puts every packed weight into the engine's order now, not in the first call."""
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.prepare()

    def scratch_bytes(self) -> int:
        """Memory of the last two calls' shapes beyond weights, inputs and output."""
        return self.scratch.nbytes

    def forward(
        self,
        x: Tensor,
        t: Tensor | When,
        cond: Tensor,
        guidance: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor:
        differentiable = torch.is_grad_enabled() and (x.requires_grad or cond.requires_grad)
        if x.device.type != "cpu" or differentiable or not support.cpu_engine("int8 a8 DiT"):
            return super().forward(x, t, cond, guidance, repeats)
        with torch.no_grad(), self.scratch.lock:
            return self._fused(x, self.when(t, guidance), cond, repeats)

    def _fused(self, x: Tensor, when: When, cond: Tensor, repeats: int) -> Tensor:
        raise NotImplementedError


def takes(linears: Iterable[nn.Module]) -> bool:
    """Whether all linears of a block are packed and compute on int8 activations."""
    return all(isinstance(linear, PackedLinear) and linear.compute == "a8" for linear in linears)


def dense(linear: nn.Linear) -> Any:
    """A linear that is kept in float, as the engine reads it."""
    from vitapack.kernels.linear.cpu_plans import Dense

    return Dense(linear.weight.detach(), None if linear.bias is None else plain(linear.bias))


def modulation_rows(modulation: Any, when: When) -> Tensor:
    """Modulation as the engine reads it: (B or 1, chunks * h) float32."""
    if hasattr(modulation, "table"):
        return modulation.table[when.rows].float().contiguous()
    return modulation.lin(when.vector).float().contiguous()


def plain(values: Tensor) -> Tensor:
    """As the engine reads parameters: contiguous float32."""
    return values.detach().float().contiguous()


def stream_weights(attention: Any, mlp: Any) -> Any:
    """Self-attention and MLP of one stream of tokens."""
    from vitapack.kernels.linear.cpu_plans import StreamWeights

    return StreamWeights(
        attention.qkv.prepare(),
        plain(attention.norm.query_norm.scale),
        plain(attention.norm.key_norm.scale),
        proj=attention.proj.prepare(),
        up=mlp[0].prepare(),
        down=mlp[2].prepare(),
    )
