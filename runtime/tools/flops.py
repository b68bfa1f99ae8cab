"""Counts the floating-point operations of one denoising step by running the network on "meta".

    count = step_flops(config, latents=(3072, 64), cond_tokens=1370, batch=2)

The meta device computes nothing; torch's counter adds up matrix products and attention, two
operations per multiply-add. Packing does not change the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitapack.runtime.engines.choose import network_of
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times, guided_times


@dataclass(frozen=True)
class Flops:
    total: int
    attention: int  # included in total: query-key and probability-value products

    def to_json(self) -> dict[str, int]:
        return {"total": self.total, "attention": self.attention}


def step_flops(
    config: Architecture, latents: tuple[int, ...], cond_tokens: int, batch: int
) -> Flops:
    """Operations of one network evaluation; `batch` is 2 for guidance as one batch."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = network_of(config).eval().requires_grad_(False)
        x, t = torch.empty(batch, *latents), torch.empty(batch)
        cond = torch.empty(batch, cond_tokens, config.cond_channels)
        guidance = torch.empty(batch) if config.embeds_guidance else None
        linear = 0

        def count(module: nn.Linear, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            nonlocal linear
            linear += 2 * module.in_features * out.numel()

        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(count)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(x, t, cond, guidance)
    total = counter.get_total_flops()
    return Flops(total, total - linear)


def guided_flops(
    config: Architecture, latents: tuple[int, ...], cond_tokens: int, one_batch: bool
) -> Flops:
    """Operations of one guided step: one batch of two, or one evaluation with the image's tokens
    and one with a single token; a single evaluation if guidance is embedded."""
    if config.embeds_guidance:
        return step_flops(config, latents, cond_tokens, 1)
    if one_batch:
        return step_flops(config, latents, cond_tokens, 2)
    passes = [step_flops(config, latents, tokens, 1) for tokens in (cond_tokens, 1)]
    return Flops(sum(f.total for f in passes), sum(f.attention for f in passes))


def run_flops(
    config: Architecture,
    latents: tuple[int, ...],
    cond_tokens: int,
    sampler: SamplerDefaults,
) -> int:
    """Operations of all network evaluations of one generation, guided steps in two passes."""
    times, guided = evaluation_times(sampler), guided_times(sampler)
    one = step_flops(config, latents, cond_tokens, 1).total
    if config.embeds_guidance or sampler.guidance == 1:
        return one * len(times)
    twice = len(times) if guided is None else sum(t in guided for t in times)
    return one * len(times) + step_flops(config, latents, 1, 1).total * twice
