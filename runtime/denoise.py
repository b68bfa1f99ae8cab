"""From noise to latents: a network under its sampler, guidance and dtypes included.

latents = denoise(network, SamplerDefaults("euler", 20, 5.0), cond, noise)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitapack.runtime import sampling
from vitapack.runtime.dit import MissingTime
from vitapack.runtime.errors import UserError
from vitapack.runtime.trellis import Network


@torch.inference_mode()
def denoise(
    network: Network,
    settings: sampling.SamplerDefaults,
    cond: Tensor,
    noise: Tensor,
    *,
    one_batch: bool = True,
    progress: sampling.Progress | None = None,
) -> Tensor:
    """Latents of the noise's shape, float32, on the network's device.

    cond (1, N, D) is what the network is conditioned on, zeros what it is guided away from;
    `one_batch`: both as one batch of two, or in two passes, which need half the memory. A network
    that embeds its guidance is called once. UserError for a time without a modulation table.
    """
    where = next(p for p in network.parameters() if p.is_floating_point())
    cond = cond.to(where)
    embedded = torch.tensor([settings.guidance], device=where.device)

    def call(x: Tensor, t: float, tokens: Tensor) -> Tensor:
        # float64, so that a time finds its own row of the modulation tables.
        when = torch.tensor([t], dtype=torch.float64, device=where.device)
        if network.config.guidance_embed:
            return network(x.to(where.dtype), when, tokens, embedded).float()
        return network(x.to(where.dtype), when, tokens).float()

    velocity = sampling.classifier_free(
        call,
        cond,
        torch.zeros_like(cond),
        1.0 if network.config.guidance_embed else settings.guidance,
        one_batch=one_batch,
        only_at=sampling.guided_times(settings),
    )
    try:
        return sampling.sample(velocity, noise.to(where.device), settings, progress).float()
    except MissingTime as error:
        raise UserError(str(error)) from None
