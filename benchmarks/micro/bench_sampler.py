"""Twenty guided steps with a network that costs next to nothing: what the sampler itself takes."""

import pytest
import torch

from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.sampling.solvers import classifier_free, sample


@pytest.mark.parametrize("name", ["euler", "unipc"])
def bench_steps(benchmark, name):
    settings = SamplerDefaults(name, 20, 5.0)
    condition = torch.zeros(1, 1, 1)
    velocity = classifier_free(lambda x, t, cond: x, condition, condition, settings.guidance)
    benchmark(sample, velocity, torch.randn(1, 512, 64), settings)
