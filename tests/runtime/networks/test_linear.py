"""Packed linears, with the file's tensors and in the CPU engine's order, against the float linear
that their weight stands for."""

import pytest
import torch
import torch.nn.functional as F

from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.kernels.linear.layouts import LAYOUTS
from vitapack.kernels.linear.weights import PackedWeight, dequantize
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.networks.linear import PackedLinear

BOTH = pytest.mark.parametrize("form", [PackedLinear, CpuLinear])
ALL = pytest.mark.parametrize(
    "layout", [LAYOUTS["w8-c-v1"], LAYOUTS["w4-b64-g32-v1"]], ids=lambda layout: layout.id
)


def make(form, layout, n=24, k=100, bias=True, compute="a16"):
    rng = torch.Generator().manual_seed(n * k + layout.bits)
    weight = torch.randn(n, k, generator=rng) * 0.05
    packed = QUANTIZERS["search"]().quantize("a", weight, layout)
    given = torch.randn(n, generator=rng) if bias else None
    return form(packed, given, compute), dequantize(packed), given


@BOTH
@ALL
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 100), (100,), (0, 100), (2, 5, 100)])
def test_a16_equals_the_fake_quantized_linear(form, layout, bias, shape):
    layer, weight, given = make(form, layout, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = F.linear(x, weight, given)
    # To rounding: the CPU engine sums integers times activations and scales the sum.
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    x.requires_grad_()  # the reference serves gradients: the same operations, the same bits
    assert torch.equal(layer(x), F.linear(x, weight, given))
    assert torch.equal(dequantize(layer.packed()), weight)


@BOTH
@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a16_error_is_that_of_the_dtype(form, layout, dtype):
    layer, weight, bias = make(form, layout)
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours = (layer(x.to(dtype)).double() - exact).norm()
    theirs = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert layer(x.to(dtype)).dtype == dtype
    assert ours <= 2 * (theirs.double() - exact).norm()


@BOTH
@ALL
def test_a8_error_is_bounded_by_the_activation_step(form, layout):
    layer, weight, bias = make(form, layout, compute="a8")
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(1))
    reference = F.linear(x, weight, bias)
    # |error of one output| <= sum_k |w| * sx / 2, with sx = absmax(token) / 127.
    bound = weight.abs().sum(1) * x.abs().amax(1, keepdim=True) / 127 / 2
    error = (layer(x) - reference).abs()
    assert (error <= bound * 1.0001 + 1e-5).all()
    assert error.norm() / reference.norm() < 0.01


@BOTH
@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_non_contiguous_input_and_one_token_at_a_time(form, compute):
    layer, _, _ = make(form, LAYOUTS["w4-b64-g32-v1"], compute=compute)
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(2)).t()
    whole = layer(x)
    torch.testing.assert_close(whole, layer(x.contiguous()), rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[2:3], layer(x[2:3]), rtol=1e-5, atol=1e-6)


@BOTH
def test_half_keeps_the_scales_in_float32(form):
    layer, _, _ = make(form, LAYOUTS["w8-c-v1"])
    before = layer.packed().scale.clone()
    layer.half()
    after = layer.packed()
    assert after.scale.dtype == torch.float32
    assert torch.equal(after.scale, before)
    assert after.codes.dtype == torch.int8


def test_half_converts_the_bias_of_the_files_tensors():
    layer, _, _ = make(PackedLinear, LAYOUTS["w8-c-v1"])
    assert layer.half().bias.dtype == torch.float16


@BOTH
def test_repr_and_refusals(form):
    layer, _, _ = make(form, LAYOUTS["w4-b64-g32-v1"])
    name = form.__name__
    assert repr(layer) == f"{name}(100 -> 24, int4 group 32, bias=True, compute=a16)"
    with pytest.raises(ValueError, match="expected 100 input features, found 99"):
        layer(torch.zeros(1, 99))
    weight = layer.packed()
    with pytest.raises(ValueError, match="q4 in w4-b64-g32-v1: expected"):
        form(PackedWeight(weight.layout, weight.tensors, 128 + 1), None)
    with pytest.raises(ValueError, match="expected one of a16, a8"):
        form(weight, None, "a4")
    with pytest.raises(ValueError, match="holds q4, group, scale; found scale"):
        form(PackedWeight(weight.layout, {"scale": weight.scale}, 100), None)
