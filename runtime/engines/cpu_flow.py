"""TRELLIS' packed flow transformer on CPUs: the blocks of `runtime/networks/flow.py` through the
int8
engine's fused phases, SLAT's too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitapack.runtime.engines.cpu import (
    Engine,
    dense,
    modulation_rows,
    plain,
    stream_weights,
    takes,
)
from vitapack.runtime.networks.flow import (
    FlowBlock,
    FlowTransformer,
    cube,
    patches,
    place_embedding,
)
from vitapack.runtime.networks.modulation import When


class EngineFlow(Engine, FlowTransformer):
    """A `FlowTransformer` whose packed int8-activation blocks run fused on the CPU."""

    def _fused(self, x: Tensor, when: When, cond: Tensor, repeats: int) -> Tensor:
        from vitapack.kernels.linear.cpu_plans import FlowPlan

        config = self.config
        tokens = patches(x, config.patch) if config.in_channels else x
        plan = self.scratch.plan_for(
            FlowPlan, *tokens.shape[:2], config.hidden, config.heads, config.mlp_hidden,
            torch.get_num_threads(), config.token_channels, config.cond_channels,
        )  # fmt: skip
        z = plan.tokens
        if config.in_channels:
            side = config.resolution // config.patch
            plan.enter(dense(self.latent_in), tokens)
            z += place_embedding(side, config.hidden)
        else:
            z.copy_(tokens)
        wide = plain(cond)
        if cond.shape[1] > 1:
            plan.expect(cond.shape[1])
        block: Any
        for block in self.blocks.values():
            if fused(block):
                # A single token of the condition adds the same to all tokens.
                given = block.cross_attn(z, wide)[:, 0] if cond.shape[1] == 1 else wide
                plan.block(
                    stream_weights(block.self_attn, block.mlp),
                    _cross_weights(block),
                    modulation_rows(block.mod, when),
                    plain(given),
                )
            else:
                z.copy_(block(z.to(x.dtype), cond, when))
        if not config.in_channels:
            return z.to(x.dtype, copy=True)
        none = torch.zeros(1, config.hidden, dtype=torch.float32)  # its norm is not modulated
        out = torch.empty(tokens.shape, dtype=x.dtype)
        plan.leave(dense(self.final_layer.linear), none, none, 1e-5, out)
        return cube(out, side, config.patch)


def fused(block: FlowBlock) -> bool:
    """Whether the engine takes a block."""
    own, cross = block.self_attn, block.cross_attn
    return takes((own.qkv, own.proj, cross.q, cross.kv, cross.proj, block.mlp[0], block.mlp[2]))


def _cross_weights(block: Any) -> Any:
    from vitapack.kernels.linear.cpu_plans import CrossWeights

    norm, cross = block.cross_norm, block.cross_attn
    shift, scale = plain(norm.bias), plain(norm.weight) - 1
    return CrossWeights(shift, scale, cross.q.prepare(), cross.kv.prepare(), cross.proj.prepare())
