"""The packed DiT on CPUs: the blocks of `runtime/dit.py` through the int8 engine's fused phases.

`load_dit(..., compute="a8")` returns an `EngineDiT`, called like any other. Its blocks are the same
modules with the same parameters; only the order of the arithmetic differs (csrc/int8_dit.cpp). What
the engine cannot take, a block with 16-bit linears or a call that needs gradients, runs in the
readable form.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.kernels import dispatch
from vitapack.runtime.dit import DiT, DoubleBlock, SingleBlock, When, layer_norm, multiplicity
from vitapack.runtime.linear import PackedLinear

FINAL_ROWS = 512  # latents that leave at a time, so that the last layer's temporaries stay small


class Scratch:
    """The plans of a model and its copies: memory for two shapes, for one caller.

    Two, because a guided step is a call with the picture's tokens and one with a single token.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.plans: list[Any] = []  # the one used last comes last

    def plan_for(self, *key: int) -> Any:
        from vitapack.kernels.cpu import Plan

        plan = next((plan for plan in self.plans if plan.key == key), None)
        if plan is None:
            del self.plans[:-1]  # the old shape's memory goes before the new one's comes
            plan = Plan(*key)
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


class EngineDiT(DiT):
    """A `DiT` whose packed int8-activation blocks run fused on the CPU."""

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
        if x.device.type != "cpu" or differentiable or not dispatch.cpu_engine("int8 a8 DiT"):
            return super().forward(x, t, cond, guidance, repeats)
        with torch.no_grad(), self.scratch.lock:
            return self._fused(x, self.when(t, guidance), cond, repeats)

    def _fused(self, x: Tensor, when: When, cond: Tensor, repeats: int) -> Tensor:
        batch, split = x.shape[0], cond.shape[1]
        config = self.config
        plan = self.scratch.plan_for(
            batch, split + x.shape[1], config.hidden, config.heads, config.mlp_hidden,
            torch.get_num_threads(), split if repeats > 1 else 0, repeats,
        )  # fmt: skip
        bias = multiplicity(repeats, split, x.shape[1], x)
        z = plan.tokens
        for b in range(batch):
            _embed(self.cond_in, cond[min(b, len(cond) - 1)], z[b, :split])
            _embed(self.latent_in, x[b], z[b, split:])
        block: Any
        for block in self.double_blocks.values():
            if fused(block):
                streams = [
                    (0, split, _stream(block.txt_attn, block.txt_mlp), _rows(block.txt_mod, when)),
                    (split, x.shape[1], _stream(block.img_attn, block.img_mlp),
                     _rows(block.img_mod, when)),
                ]  # fmt: skip
                plan.double_block(streams)
            else:
                latents, condition = z[:, split:].to(x.dtype), z[:, :split].to(x.dtype)
                z[:, split:], z[:, :split] = block(latents, condition, when, bias)
        *_, last = (None, *self.single_blocks.values())
        for block in self.single_blocks.values():
            if fused(block):
                plan.single_block(
                    _weights(block.linear1, block.norm),
                    block.linear2.prepare(),
                    _rows(block.modulation, when),
                    split if block is last else 0,  # the final layer reads latents only
                )
            else:
                z.copy_(block(z.to(x.dtype), when, bias))
        return self._final(z[:, split:], when, x.dtype)

    def _final(self, z: Tensor, when: When, dtype: torch.dtype) -> Tensor:
        """`FinalLayer` on some rows at a time; z is used up."""
        shift, scale = (part.float() for part in self.final_layer.shift_scale(when))
        linear = self.final_layer.linear
        out = z.new_empty(*z.shape[:2], linear.out_features, dtype=dtype)
        for start in range(0, z.shape[1], FINAL_ROWS):
            rows = layer_norm(z[:, start : start + FINAL_ROWS]).mul_(1 + scale).add_(shift)
            out[:, start : start + FINAL_ROWS] = linear(rows.to(linear.weight.dtype))
        return out


def fused(block: DoubleBlock | SingleBlock) -> bool:
    """Whether all linears of a block's tokens are packed and compute on int8 activations."""
    linears: list[nn.Module]
    if isinstance(block, DoubleBlock):
        sides = ((block.img_attn, block.img_mlp), (block.txt_attn, block.txt_mlp))
        linears = [linear for a, m in sides for linear in (a.qkv, a.proj, m[0], m[2])]
    else:
        linears = [block.linear1, block.linear2]
    return all(isinstance(linear, PackedLinear) and linear.compute == "a8" for linear in linears)


def _embed(linear: nn.Linear, x: Tensor, out: Tensor) -> None:
    """linear(x) of rows (n, K) straight into out (n, h) float32."""
    if x.dtype == linear.weight.dtype == torch.float32:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)
    else:
        out.copy_(linear(x.to(linear.weight.dtype)))


def _rows(modulation: Any, when: When) -> Tensor:
    """Modulation as the engine reads it: (B or 1, chunks * h) float32."""
    if hasattr(modulation, "table"):
        return modulation.table[when.rows].float().contiguous()
    return modulation.lin(when.vector).float().contiguous()


def _weights(qkv: Any, norm: Any, **more: Any) -> Any:
    from vitapack.kernels.cpu import StreamWeights

    query, key = (side.scale.detach().float() for side in (norm.query_norm, norm.key_norm))
    return StreamWeights(qkv.prepare(), query.contiguous(), key.contiguous(), **more)


def _stream(attention: Any, mlp: Any) -> Any:
    return _weights(
        attention.qkv,
        attention.norm,
        proj=attention.proj.prepare(),
        up=mlp[0].prepare(),
        down=mlp[2].prepare(),
    )
