"""TRELLIS' packed flow transformer on CPUs: `runtime/networks/flow.py` on the int8 engine.

SLAT's blocks run on it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitapack.runtime.engines.cpu import (
    ROWS,
    Scratch,
    dense,
    modulation_rows,
    plain,
    runs_fused,
    stream_weights,
    takes,
)
from vitapack.runtime.format.architecture import FlowConfig
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.flow import (
    FlowBlock,
    FlowTransformer,
    cube,
    given_bytes,
    patches,
    position_embedding,
    token_count,
)
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import CallShape


class CpuFlow(FlowTransformer):
    """A `FlowTransformer` whose packed int8-activation blocks run fused on the CPU."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.scratch = Scratch()

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        if not runs_fused(x, condition):
            return super().evaluate(x, step, condition)
        with torch.no_grad(), self.scratch.lock:
            return self._fused(x, step, condition)

    def _fused(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        from vitapack.kernels.linear.cpu_plans import FlowPlan

        config, cond = self.config, condition.tokens
        tokens = patches(x, config.patch) if config.has_edges else x
        plan = self.scratch.plan_for(
            FlowPlan, *tokens.shape[:2], config.hidden, config.heads, config.mlp_hidden,
            torch.get_num_threads(), config.token_channels, config.cond_channels,
        )  # fmt: skip
        z = plan.tokens
        if config.has_edges:
            side = config.resolution // config.patch
            plan.enter(dense(self.latent_in), tokens)
            z += position_embedding(side, config.hidden)
        else:
            z.copy_(tokens)
        wide = plain(cond)
        if cond.shape[1] > 1:
            plan.expect(cond.shape[1])
        block: Any
        for block in self.blocks.values():
            if fused(block):
                # A single condition token adds the same vector to all tokens.
                given = block.cross_attn(z, wide)[:, 0] if cond.shape[1] == 1 else wide
                plan.block(
                    stream_weights(block.self_attn, block.mlp),
                    _cross_weights(block),
                    modulation_rows(block.mod, step),
                    plain(given),
                )
            else:
                z.copy_(block(z.to(x.dtype), cond, step))
        if not config.has_edges:
            return z.to(x.dtype, copy=True)
        none = torch.zeros(1, config.hidden, dtype=torch.float32)  # its norm is not modulated
        out = torch.empty(tokens.shape, dtype=x.dtype)
        plan.leave(dense(self.final_layer.linear), none, none, 1e-5, out)
        return cube(out, side, config.patch)

    @classmethod
    def step_bytes(cls, config: FlowConfig, call: CallShape) -> int:
        h, tokens = config.hidden, token_count(config, call)
        # The float32 stream and attention's output; q, k and v in bytes, k and v of the condition,
        # with their scales and sums.
        plan = call.batch * tokens * (2 * 4 * h + 3 * h + 20 * config.heads)
        plan += call.batch * call.cond_tokens * (2 * h + 16 * config.heads)
        rows = torch.get_num_threads() * ROWS * 5 * max(3 * h, config.mlp_hidden)
        return given_bytes(config, call) + plan + rows


def fused(block: FlowBlock) -> bool:
    """Whether a block runs on the engine."""
    own, cross = block.self_attn, block.cross_attn
    return takes((own.qkv, own.proj, cross.q, cross.kv, cross.proj, block.mlp[0], block.mlp[2]))


def _cross_weights(block: Any) -> Any:
    from vitapack.kernels.linear.cpu_plans import CrossWeights

    norm, cross = block.cross_norm, block.cross_attn
    shift, scale = plain(norm.bias), plain(norm.weight) - 1
    return CrossWeights(shift, scale, cross.q.panels, cross.kv.panels, cross.proj.panels)
