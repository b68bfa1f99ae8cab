"""Turns noise into latents with a network, its sampler and guidance.

latents = denoise(network, SamplerDefaults("euler", 20, 5.0), cond, noise)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitapack.runtime.engines.cuda_graph import GraphedNetwork
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times, guided_times
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import Network
from vitapack.runtime.progress import Control
from vitapack.runtime.sampling import solvers as sampling


@torch.inference_mode()
def denoise(
    network: Network | GraphedNetwork,
    settings: SamplerDefaults,
    cond: Tensor,
    noise: Tensor,
    *,
    one_batch: bool = False,
    control: Control | None = None,
) -> Tensor:
    """Samples latents: float32, of the noise's shape, on the network's device.

    cond (1, N, D) and `one_batch` as in `velocity_of`. Raises MissingTime if the modulation tables
    lack a time of the sampler.
    """
    device = next(network.parameters()).device
    velocity = velocity_of(network, settings, cond, one_batch=one_batch)
    return sampling.sample(velocity, noise.to(device), settings, control).float()


def velocity_of(
    network: Network | GraphedNetwork,
    settings: SamplerDefaults,
    cond: Tensor,
    *,
    one_batch: bool = False,
) -> sampling.Velocity:
    """The guided velocity at (x, t), float32, on the network's device; x (1, L, C) float32.

    cond: the condition tokens (1, N, D). The null condition is N tokens of zeros; since they are
    equal, the unconditional pass takes a single one with `repeats=N`. This is exact, saves a third
    of a step's operations if latents are few (512 with 1370 condition tokens), and takes half the
    memory of `one_batch`, which evaluates both conditions as one batch of two with all their
    tokens, as the reference implementations do. A network that embeds its guidance is evaluated
    once per step. All times of the sampler are looked up before the first step, which synchronises
    with the GPU; the steps do not. Raises MissingTime if the tables lack one of them.
    """
    weight = next(p for p in network.parameters() if p.is_floating_point())
    cond = cond.to(weight)
    embedded = torch.tensor([settings.guidance], dtype=torch.float32, device=weight.device)
    guidance = embedded if network.config.embeds_guidance else None

    @functools.cache
    def step(t: float) -> StepModulation:
        # float64, so that a time matches its row of the modulation tables.
        time = torch.tensor([t], dtype=torch.float64, device=weight.device)
        return network.step_modulation(time, guidance)

    for t in evaluation_times(settings):
        step(t)

    def call(x: Tensor, t: float, tokens: Tensor) -> Tensor:
        condition = Condition(tokens, repeats=cond.shape[1] // tokens.shape[1])
        return network(x.to(weight.dtype), step(t), condition).float()

    return sampling.classifier_free(
        call,
        cond,
        torch.zeros_like(cond if one_batch else cond[:, :1]),
        1.0 if network.config.embeds_guidance else settings.guidance,
        one_batch=one_batch,
        only_at=guided_times(settings),
    )
