"""Encoder weights that are brought to 8 bits as they are read."""

import pytest
import torch

from vitapack.kernels.linear import cpu
from vitapack.runtime.loading.fill import in_8_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (700, 96), (513, 130)])
def test_the_engine_makes_the_same_codes(dtype, shape, monkeypatch):
    rng = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=rng).to(dtype)
    weight[-1] = 0
    codes, scale = in_8_bits(weight)
    assert scale.shape == shape[:1]
    assert (codes.float() * scale[:, None] - weight.float()).abs().max() <= scale.max() / 2 * 1.001
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain = in_8_bits(weight)
    assert torch.equal(codes, plain[0])
    assert torch.equal(scale, plain[1])
