"""The packed DiT on CPUs: the blocks of `runtime/networks/dit.py` through the int8 engine's fused
phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitapack.runtime.engines.cpu import (
    Engine,
    dense,
    modulation_rows,
    plain,
    stream_weights,
    takes,
)
from vitapack.runtime.networks.blocks import multiplicity
from vitapack.runtime.networks.dit import DiT, DoubleBlock, SingleBlock
from vitapack.runtime.networks.modulation import When


class EngineDiT(Engine, DiT):
    """A `DiT` whose packed int8-activation blocks run fused on the CPU."""

    def _fused(self, x: Tensor, when: When, cond: Tensor, repeats: int) -> Tensor:
        from vitapack.kernels.linear.cpu_plans import DitPlan, StreamWeights

        config = self.config
        batch, split = x.shape[0], cond.shape[1]
        plan = self.scratch.plan_for(
            DitPlan, batch, split + x.shape[1], config.hidden, config.heads, config.mlp_hidden,
            torch.get_num_threads(), max(config.in_channels, config.cond_channels),
            split if repeats > 1 else 0, repeats,
        )  # fmt: skip
        bias = multiplicity(repeats, split, x.shape[1], x)
        z = plan.tokens
        plan.enter(dense(self.cond_in), cond)
        plan.enter(dense(self.latent_in), x, split)
        block: Any
        for block in self.double_blocks.values():
            if fused(block):
                streams = [
                    (0, split, stream_weights(block.txt_attn, block.txt_mlp),
                     modulation_rows(block.txt_mod, when)),
                    (split, x.shape[1], stream_weights(block.img_attn, block.img_mlp),
                     modulation_rows(block.img_mod, when)),
                ]  # fmt: skip
                plan.double_block(streams)
            else:
                latents, condition = z[:, split:].to(x.dtype), z[:, :split].to(x.dtype)
                z[:, split:], z[:, :split] = block(latents, condition, when, bias)
        *_, last = (None, *self.single_blocks.values())
        for block in self.single_blocks.values():
            if fused(block):
                query, key = block.norm.query_norm.scale, block.norm.key_norm.scale
                plan.single_block(
                    StreamWeights(block.linear1.prepare(), plain(query), plain(key)),
                    block.linear2.prepare(),
                    modulation_rows(block.modulation, when),
                    split if block is last else 0,  # the final layer reads latents only
                )
            else:
                z.copy_(block(z.to(x.dtype), when, bias))
        final = dense(self.final_layer.linear)
        shift, scale = (part[:, 0].float() for part in self.final_layer.shift_scale(when))
        out = torch.empty(*x.shape[:2], len(final.weight), dtype=x.dtype)
        plan.leave(final, shift, scale, 1e-6, out)
        return out


def fused(block: DoubleBlock | SingleBlock) -> bool:
    """Whether the engine takes a block."""
    linears: list[nn.Module]
    if isinstance(block, DoubleBlock):
        sides = ((block.img_attn, block.img_mlp), (block.txt_attn, block.txt_mlp))
        linears = [linear for a, m in sides for linear in (a.qkv, a.proj, m[0], m[2])]
    else:
        linears = [block.linear1, block.linear2]
    return takes(linears)
