"""Sampling schedules as pure arithmetic, torch-free: settings, levels and model times."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from vitapack.runtime.choices import MAX_STEPS, SAMPLERS, check_choice, guidance, is_number, whole
from vitapack.runtime.errors import FormatError, UserError

FLOWS = ("hunyuan", "step1x", "trellis")
TRAIN_STEPS = MAX_STEPS


@dataclass(frozen=True)
class SamplerDefaults:
    """Settings of a sampler. Raises UserError for an invalid value."""

    name: str  # one of SAMPLERS; "euler" is each flow's own Euler schedule
    steps: int
    guidance: float  # w of v = u + w (c - u), or the input of the guidance embedding
    shift: float = 1.0  # s of sigma <- s sigma / (1 + (s - 1) sigma); TRELLIS calls it rescale_t
    flow: str = "hunyuan"  # one of FLOWS
    order: int = 2  # of UniPC, 1 to 3
    pcm_timesteps: int = 100  # of the consistency schedule: grid of times used in distillation
    zero_init: bool = False  # Step1X Euler: the first prediction counts as zero
    guidance_interval: tuple[float, float] | None = None  # levels in 0..1 with guidance

    def __post_init__(self) -> None:
        check_choice("sampler", self.name, SAMPLERS)
        if self.flow not in FLOWS:
            raise UserError(f"no flow {self.flow!r}: expected one of {', '.join(FLOWS)}")
        if self.name == "consistency" and self.flow != "hunyuan":
            raise UserError("the consistency sampler exists for Hunyuan3D models only; use euler")
        whole(self.steps, 1, TRAIN_STEPS, "steps")
        whole(self.order, 1, 3, "order")
        whole(self.pcm_timesteps, 1, TRAIN_STEPS, "pcm_timesteps")
        if TRAIN_STEPS % self.pcm_timesteps:
            raise UserError(f"pcm_timesteps {self.pcm_timesteps} does not divide {TRAIN_STEPS}")
        if self.name == "consistency" and self.steps > self.pcm_timesteps:
            raise UserError(
                f"{self.steps} consistency steps: this model was distilled on a grid of "
                f"{self.pcm_timesteps}, take at most that many"
            )
        if not (is_number(self.shift) and self.shift > 0):
            raise UserError(f"shift {self.shift!r}: expected a number above 0")
        guidance(self.guidance, "guidance")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1):
                raise UserError(f"guidance_interval {self.guidance_interval}: expected 0 <= a <= b")
            object.__setattr__(self, "guidance_interval", (float(low), float(high)))

    def with_values(
        self,
        *,
        name: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> SamplerDefaults:
        """These settings with the given values; None keeps a value. Raises UserError."""
        given = {"name": name, "steps": steps, "guidance": guidance}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplerDefaults:
        """The inverse of `to_json`. Raises FormatError for missing or unknown keys."""
        known = {field.name for field in fields(cls)}
        needed = {"name", "steps", "guidance"}
        if not isinstance(data, Mapping) or not needed <= data.keys() <= known:
            found = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
            raise FormatError(f"sampler settings hold {found}; expected {', '.join(sorted(known))}")
        interval = data.get("guidance_interval")
        return cls(**{**data, "guidance_interval": None if interval is None else tuple(interval)})


@dataclass(frozen=True)
class Schedule:
    """N steps: step i evaluates at `times[i]` and moves from `levels[i]` to `levels[i + 1]`."""

    levels: tuple[float, ...]  # N + 1; t for the Hunyuan Euler kinds, sigma otherwise
    times: tuple[float, ...]  # N, in the model's convention, float32 values
    evaluated: tuple[bool, ...]  # N; False if the velocity would be multiplied by zero


def schedule(settings: SamplerDefaults) -> Schedule:
    """The schedule of one generation: pure arithmetic, no torch."""
    steps, shift = settings.steps, settings.shift
    if settings.name == "unipc":
        # diffusers' UniPCMultistepScheduler with use_flow_sigmas (as for FLUX).
        levels = [_shift(s, shift) for s in _linspace(1.0, 1.0 / TRAIN_STEPS, steps + 1)[:-1]]
        if abs(levels[0] - 1) < 1e-6:
            levels[0] -= 1e-6  # lambda = log(alpha / sigma) must be finite
        # Rounded to float32: alpha_0 = 1 - sigma_0 is then 1.0133e-6, not 1e-6,
        # and the first lambda depends on it.
        levels = [_float32(s) for s in levels] + [0.0]
    elif settings.name == "consistency":
        stride = TRAIN_STEPS // settings.pcm_timesteps
        grid = [0, *(k * stride - 1 for k in range(1, settings.pcm_timesteps))]
        picked = [grid[i * settings.pcm_timesteps // steps] for i in range(steps)]
        levels = [_float32(_shift(i / (TRAIN_STEPS - 1), shift)) for i in picked] + [1.0]
    elif settings.flow == "hunyuan":
        levels = [_float32(_shift(s, shift)) for s in _linspace(0.0, 1.0, steps)] + [1.0]
    elif settings.flow == "step1x":
        # diffusers' FlowMatchEulerDiscreteScheduler shifts the lower end once in its constructor,
        # and all levels again in every run.
        last = _shift(1.0 / TRAIN_STEPS, shift)
        levels = [_float32(_shift(s, shift)) for s in _linspace(1.0, last, steps)] + [0.0]
    else:
        levels = [_shift(s, shift) for s in _linspace(1.0, 0.0, steps + 1)]
    reverse = settings.name == "unipc"
    if settings.flow == "hunyuan":
        times = [_float32(1 - level if reverse else level) for level in levels[:-1]]
    else:
        times = [_float32(TRAIN_STEPS * level) for level in levels[:-1]]
    evaluated = [
        before != after and not (i == 0 and settings.zero_init and not reverse)
        for i, (before, after) in enumerate(itertools.pairwise(levels))
    ]
    return Schedule(tuple(levels), tuple(times), tuple(evaluated))


def times(sampler: str, steps: int, shift: float = 1.0, **others: Any) -> list[float]:
    """The model times at which the network will be evaluated, in order.

    `others` are further fields of SamplerDefaults (flow, order, pcm_timesteps, zero_init, ...).
    Hunyuan Euler's last velocity and Step1X's first are multiplied by zero, so these evaluations
    are skipped and not listed (20 steps are 19 evaluations).
    """
    return evaluation_times(SamplerDefaults(sampler, steps, 1.0, shift, **others))


def evaluation_times(settings: SamplerDefaults) -> list[float]:
    """The model times at which the network is evaluated, in order; see `times`."""
    plan = schedule(settings)
    return [t for t, evaluated in zip(plan.times, plan.evaluated, strict=True) if evaluated]


def guided_times(settings: SamplerDefaults) -> frozenset[float] | None:
    """The model times of guided steps; None if all steps are guided."""
    if settings.guidance_interval is None:
        return None
    low, high = settings.guidance_interval
    plan = schedule(settings)
    return frozenset(
        t for t, level in zip(plan.times, plan.levels, strict=False) if low <= level <= high
    )


def _shift(sigma: float, s: float) -> float:
    return s * sigma / (1 + (s - 1) * sigma)


def _linspace(first: float, last: float, count: int) -> list[float]:
    if count == 1:
        return [first]
    step = (last - first) / (count - 1)
    return [first + i * step for i in range(count - 1)] + [last]


def _float32(value: float) -> float:
    return float(np.float32(value))
