"""The packed DiT on CPUs: the blocks of `runtime/networks/dit.py` on the int8 engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
from vitapack.runtime.format.architecture import DiTConfig
from vitapack.runtime.networks.blocks import Condition, repeated_key_bias
from vitapack.runtime.networks.dit import DiT, DoubleBlock, SingleBlock, given_bytes
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import CallShape


class CpuDiT(DiT):
    """A `DiT` whose packed int8-activation blocks run fused on the CPU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.scratch = Scratch()

    def evaluate(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        if not runs_fused(x, condition):
            return super().evaluate(x, step, condition)
        with torch.no_grad(), self.scratch.lock:
            return self._fused(x, step, condition)

    def _fused(self, x: Tensor, step: StepModulation, condition: Condition) -> Tensor:
        from vitapack.kernels.linear.cpu_plans import DitPlan, StreamWeights

        config, cond, repeats = self.config, condition.tokens, condition.repeats
        batch, split = x.shape[0], cond.shape[1]
        plan = self.scratch.plan_for(
            DitPlan, batch, split + x.shape[1], config.hidden, config.heads, config.mlp_hidden,
            torch.get_num_threads(), max(config.in_channels, config.cond_channels),
            split if repeats > 1 else 0, repeats,
        )  # fmt: skip
        bias = repeated_key_bias(condition, x)
        z = plan.tokens
        plan.enter(dense(self.cond_in), cond)
        plan.enter(dense(self.latent_in), x, split)
        block: Any
        for block in self.double_blocks.values():
            if fused(block):
                streams = [
                    (0, split, stream_weights(block.txt_attn, block.txt_mlp),
                     modulation_rows(block.txt_mod, step)),
                    (split, x.shape[1], stream_weights(block.img_attn, block.img_mlp),
                     modulation_rows(block.img_mod, step)),
                ]  # fmt: skip
                plan.double_block(streams)
            else:
                latents, condition = z[:, split:].to(x.dtype), z[:, :split].to(x.dtype)
                z[:, split:], z[:, :split] = block(latents, condition, step, bias)
        *_, last = (None, *self.single_blocks.values())
        for block in self.single_blocks.values():
            if fused(block):
                query, key = block.norm.query_norm.scale, block.norm.key_norm.scale
                plan.single_block(
                    StreamWeights(block.linear1.panels, plain(query), plain(key)),
                    block.linear2.panels,
                    modulation_rows(block.modulation, step),
                    split if block is last else 0,  # the final layer reads latents only
                )
            else:
                z.copy_(block(z.to(x.dtype), step, bias))
        final = dense(self.final_layer.linear)
        shift, scale = (chunk[:, 0].float() for chunk in self.final_layer.shift_scale(step))
        out = torch.empty(*x.shape[:2], len(final.weight), dtype=x.dtype)
        plan.leave(final, shift, scale, 1e-6, out)
        return out

    @classmethod
    def step_bytes(cls, config: DiTConfig, call: CallShape) -> int:
        h, m = config.hidden, config.mlp_hidden
        tokens = call.latents[0] + call.cond_tokens
        # Two float32 streams; q, k and v in bytes, with 28 bytes per head of scales and sums.
        streams = call.batch * tokens * (2 * 4 * h + 3 * h + 28 * config.heads)
        rows = torch.get_num_threads() * ROWS * 5 * (h + m)
        return given_bytes(config, call) + streams + rows

    @classmethod
    def run_bytes(cls, config: DiTConfig, call: CallShape) -> int:
        total = super().run_bytes(config, call)
        if call.batch == 1 and not config.embeds_guidance:  # keeps the memory of both passes
            total += cls.step_bytes(config, replace(call, cond_tokens=1))
        return total


def fused(block: DoubleBlock | SingleBlock) -> bool:
    """Whether a block runs on the engine."""
    linears: list[nn.Module]
    if isinstance(block, DoubleBlock):
        streams = ((block.img_attn, block.img_mlp), (block.txt_attn, block.txt_mlp))
        linears = [linear for a, m in streams for linear in (a.qkv, a.proj, m[0], m[2])]
    else:
        linears = [block.linear1, block.linear2]
    return takes(linears)
