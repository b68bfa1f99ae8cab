"""W4A8 against the same codes under exact float group scales, one layer."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu.int4 import float_group_weight
from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.kernels.linear.layouts import W4
from vitapack.kernels.linear.weights import dequantize
from vitapack.runtime.engines.cpu_linear import CpuLinear


def packed(weight, layout, compute="a8"):
    return CpuLinear(QUANTIZERS["search"]().quantize("a", weight, layout), None, compute)


@pytest.mark.parametrize("layout", W4, ids=lambda layout: layout.id)
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_int8_activations_and_integer_group_scales_cost_little(layout, tails):
    rng = torch.Generator().manual_seed(layout.group)
    weight, x = torch.randn(96, 500, generator=rng), torch.randn(200, 500, generator=rng)
    if tails == "heavy":  # some channels and inputs are ten times the others
        weight = weight * torch.rand(96, 1, generator=rng).add(0.05).reciprocal()
        x = x * torch.rand(500, generator=rng).add(0.1).reciprocal()
    layer = packed(weight, layout)
    exact = F.linear(x, weight)
    ours = (layer(x) - exact).norm()
    floats = (F.linear(x, float_group_weight(layer, weight)) - exact).norm()
    assert ours <= 1.05 * floats


def test_float_group_scales_are_the_least_squares_fit():
    weight = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    layer = packed(weight, W4[0])
    found = float_group_weight(layer, weight)
    assert (found - weight).norm() <= (dequantize(layer.packed()) - weight).norm()
    # Every group is a multiple of its integer steps, and no other multiple is nearer.
    steps = dequantize(layer.packed())
    for start in range(0, 100, 32):
        part = slice(start, start + 32)
        ratio = (found[:, part] * steps[:, part]).sum(1) / steps[:, part].square().sum(1)
        torch.testing.assert_close(found[:, part], ratio[:, None] * steps[:, part])
        for other in (0.99, 1.01):
            further = (other * found[:, part] - weight[:, part]).norm(dim=1)
            assert bool((further >= (found[:, part] - weight[:, part]).norm(dim=1)).all())
