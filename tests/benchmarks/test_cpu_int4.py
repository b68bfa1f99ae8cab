"""W4A8 against the same codes under exact float group scales, one layer."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu.int4 import float_group_weight
from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.runtime.networks.linear import PackedLinear


def packed(weight, group_size, compute="a8"):
    found = QUANTIZERS["search"].int4(weight, group_size)
    tensors = {f"a.weight.{suffix}": tensor for suffix, tensor in found.tensors().items()}
    return PackedLinear.from_tensors(tensors, "a", weight.shape[1], group_size, compute)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_int8_activations_and_integer_group_scales_cost_little(group_size, tails):
    rng = torch.Generator().manual_seed(group_size)
    weight, x = torch.randn(96, 500, generator=rng), torch.randn(200, 500, generator=rng)
    if tails == "heavy":  # some channels and inputs are ten times the others
        weight = weight * torch.rand(96, 1, generator=rng).add(0.05).reciprocal()
        x = x * torch.rand(500, generator=rng).add(0.1).reciprocal()
    layer = packed(weight, group_size)
    exact = F.linear(x, weight)
    ours = (layer(x) - exact).norm()
    floats = (F.linear(x, float_group_weight(layer, weight)) - exact).norm()
    assert ours <= 1.05 * floats


def test_float_group_scales_are_the_least_squares_fit():
    weight = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    layer = packed(weight, 32)
    found = float_group_weight(layer, weight)
    assert (found - weight).norm() <= (layer.dequantized() - weight).norm()
    # Every group is a multiple of its integer steps, and no other multiple is nearer.
    steps = layer.dequantized()
    for start in range(0, 100, 32):
        part = slice(start, start + 32)
        ratio = (found[:, part] * steps[:, part]).sum(1) / steps[:, part].square().sum(1)
        torch.testing.assert_close(found[:, part], ratio[:, None] * steps[:, part])
        for other in (0.99, 1.01):
            further = (other * found[:, part] - weight[:, part]).norm(dim=1)
            assert bool((further >= (found[:, part] - weight[:, part]).norm(dim=1)).all())
