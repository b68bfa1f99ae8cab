"""Solvers: from noise to latents along a learned flow, given the velocity as a function.

    settings = SamplerDefaults("unipc", steps=20, guidance=5.0)
    velocity = classifier_free(network, cond, torch.zeros_like(cond), settings.guidance)
    latents = sample(velocity, noise, settings)

`velocity(x, t)` takes the latents and a Python float: the time in the model's OWN convention
(Hunyuan3D 0..1, Step1X-3D and TRELLIS 1000..0), rounded to float32 as the network receives it.
`schedules.times(...)` lists exactly these floats before anything runs: the packed file holds exact
modulation tables for them and for no others. They are computed with additions, multiplications and
divisions alone, so every machine computes the same bits.

The three flows differ in direction: Hunyuan3D runs t from 0 (noise) to 1 (data) and predicts
data - noise; the others run sigma from 1 (noise) to 0 (data) and predict noise - data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vitapack.runtime.format.schedules import SamplerDefaults, Schedule, schedule
from vitapack.runtime.progress import Control

if TYPE_CHECKING:  # schedules alone need no torch
    from torch import Tensor


Velocity = Callable[["Tensor", float], "Tensor"]
Network = Callable[["Tensor", float, "Tensor"], "Tensor"]  # (x, t, cond) -> velocity


def sample(
    velocity: Velocity,
    noise: Tensor,
    settings: SamplerDefaults,
    control: Control | None = None,
) -> Tensor:
    """Samples latents in the shape and dtype of `noise`: float32, even for 16-bit networks."""
    x = noise
    for x in trajectory(velocity, noise, settings, control):  # noqa: B007
        pass
    return x


def trajectory(
    velocity: Velocity,
    noise: Tensor,
    settings: SamplerDefaults,
    control: Control | None = None,
) -> Iterator[Tensor]:
    """Yields the N + 1 latents of a sampling trajectory: the noise, then those after each step.

    `control` reports the phase "denoise" in network evaluations and cancels before each of them.
    """
    control = control or Control()
    plan = schedule(settings)
    total = sum(plan.evaluated)
    done = 0

    def counted(x: Tensor, t: float) -> Tensor:
        nonlocal done
        control.check()
        out = velocity(x, t)
        done += 1
        control.report("denoise", done, total)
        return out

    if settings.name == "unipc":
        yield from _unipc(counted, noise, plan, settings.order, settings.flow == "hunyuan")
    else:
        yield from _euler(counted, noise, plan)


def classifier_free(
    network: Network,
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    *,
    one_batch: bool = False,
    only_at: Collection[float] | None = None,
) -> Velocity:
    """Guided velocity u + scale (c - u), c the conditional and u the unconditional velocity.

    network(x, t, cond) with t a float; cond, uncond (1 or B, n, D). one_batch: evaluate both as one
    batch of twice the size, [cond, uncond], which must have the same shape; otherwise in two
    passes. A scale of 1 needs only the conditional pass. only_at: the times at which guidance is
    applied (see `guided_times`); None for all. TRELLIS' (1 + w) c - w u is scale = 1 + w.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        if scale == 1 or (only_at is not None and t not in only_at):
            return network(x, t, cond)
        if one_batch:
            import torch

            both = torch.cat([c.expand(len(x), *c.shape[1:]) for c in (cond, uncond)])
            cond_v, uncond_v = network(torch.cat([x, x]), t, both).chunk(2)
        else:
            cond_v, uncond_v = network(x, t, cond), network(x, t, uncond)
        return uncond_v + scale * (cond_v - uncond_v)

    return velocity


def _euler(velocity: Velocity, x: Tensor, plan: Schedule) -> Iterator[Tensor]:
    """x += (level' - level) v, for every family, since v is always dx / dlevel."""
    yield x
    for i, t in enumerate(plan.times):
        if plan.evaluated[i]:
            x = x + (plan.levels[i + 1] - plan.levels[i]) * velocity(x, t)
        yield x


def _unipc(
    velocity: Velocity, x: Tensor, plan: Schedule, order: int, negate: bool
) -> Iterator[Tensor]:
    """UniPC (Zhao et al. 2023, "bh2") in data prediction, with the corrector on every step.

    As in diffusers' scheduler, the order is lower at both ends, and the last step has order 1 and
    ends at sigma = 0. The yielded latents are the predictor's; the corrector acts at the start of
    the next step and keeps the prediction that was made at the uncorrected latents.
    """
    sigmas, steps = plan.levels, len(plan.times)
    corrected, used = x, 0
    data: list[Tensor] = []  # predicted clean latents, one per step
    yield x
    for i, t in enumerate(plan.times):
        predicted = velocity(x, t)
        new = x + sigmas[i] * predicted if negate else x - sigmas[i] * predicted
        if i:
            x = _unipc_update(corrected, data, sigmas, i - 1, used, new)
        corrected = x
        data.append(new)
        used = min(order, steps - i, i + 1)
        x = _unipc_update(corrected, data, sigmas, i, used, None)
        yield x


def _unipc_update(
    x: Tensor,
    data: list[Tensor],
    sigmas: tuple[float, ...],
    i: int,
    order: int,
    new: Tensor | None,
) -> Tensor:
    """Moves x from sigma_i to sigma_{i+1}: the predictor, or with `new` the corrector."""
    before, after = sigmas[i], sigmas[i + 1]
    if after == 0:
        return data[i]
    h = _log_snr(after) - _log_snr(before)
    ratios = [(_log_snr(sigmas[i - k]) - _log_snr(before)) / h for k in range(1, order)]
    slopes = [(data[i - k] - data[i]) / r for k, r in enumerate(ratios, 1)]
    if new is not None:
        ratios.append(1.0)
        slopes.append(new - data[i])
    phi = math.expm1(-h)
    out = (after / before) * x - ((1 - after) * phi) * data[i]
    for weight, slope in zip(_unipc_weights(ratios, h), slopes, strict=True):
        out = out - ((1 - after) * phi * weight) * slope
    return out


def _unipc_weights(ratios: list[float], h: float) -> list[float]:
    """Solves the order conditions R rho = b; a single rho is 1/2 by definition of the method."""
    count = len(ratios)
    if count < 2:
        return [0.5] * count
    rows, wanted = [], []
    phi = math.expm1(-h)
    term = phi / -h - 1
    factorial = 1
    for j in range(1, count + 1):
        rows.append([r ** (j - 1) for r in ratios])
        wanted.append(term * factorial / phi)
        factorial *= j + 1
        term = term / -h - 1 / factorial
    return np.linalg.solve(np.array(rows), np.array(wanted)).tolist()


def _log_snr(sigma: float) -> float:
    return math.log(1 - sigma) - math.log(sigma)
