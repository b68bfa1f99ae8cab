"""PackedLinear against the float linear that its weight stands for."""

import pytest
import torch
import torch.nn.functional as F

from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.runtime.networks.linear import PackedLinear


def make(bits, n=24, k=100, group=32, bias=True, compute="a16"):
    rng = torch.Generator().manual_seed(n * k + bits)
    weight = torch.randn(n, k, generator=rng) * 0.05
    quantizer = QUANTIZERS["search"]
    packed = quantizer.int8(weight) if bits == 8 else quantizer.int4(weight, group)
    tensors = {f"a.weight.{suffix}": tensor for suffix, tensor in packed.tensors().items()}
    if bias:
        tensors["a.bias"] = torch.randn(n, generator=rng)
    return PackedLinear.from_tensors(tensors, "a", k, group, compute), packed, tensors


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 100), (100,), (0, 100), (2, 5, 100)])
def test_a16_equals_the_fake_quantized_linear(bits, bias, shape):
    layer, packed, tensors = make(bits, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = F.linear(x, packed.dequantized(), tensors.get("a.bias"))
    # To rounding: the CPU engine sums integers times activations and scales the sum.
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    x.requires_grad_()  # the reference serves gradients: the same operations, the same bits
    assert torch.equal(layer(x), F.linear(x, packed.dequantized(), tensors.get("a.bias")))
    assert torch.equal(layer.dequantized(), packed.dequantized())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a16_error_is_that_of_the_dtype(bits, dtype):
    layer, packed, tensors = make(bits)
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    exact = F.linear(x.double(), packed.dequantized().double(), tensors["a.bias"].double())
    ours = (layer(x.to(dtype)).double() - exact).norm()
    theirs = F.linear(x.to(dtype), packed.dequantized().to(dtype), tensors["a.bias"].to(dtype))
    assert layer(x.to(dtype)).dtype == dtype
    assert ours <= 2 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_a8_error_is_bounded_by_the_activation_step(bits):
    layer, packed, _ = make(bits, compute="a8")
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(1))
    reference = F.linear(x, packed.dequantized(), layer.bias)
    # |error of one output| <= sum_k |w| * sx / 2, with sx = absmax(token) / 127.
    bound = packed.dequantized().abs().sum(1) * x.abs().amax(1, keepdim=True) / 127 / 2
    error = (layer(x) - reference).abs()
    assert (error <= bound * 1.0001 + 1e-5).all()
    assert error.norm() / reference.norm() < 0.01


def test_non_contiguous_input_and_one_token_at_a_time():
    for compute in ("a16", "a8"):
        layer, _, _ = make(4, compute=compute)
        x = torch.randn(100, 6, generator=torch.Generator().manual_seed(2)).t()
        whole = layer(x)
        torch.testing.assert_close(whole, layer(x.contiguous()), rtol=0, atol=1e-6)
        torch.testing.assert_close(whole[2:3], layer(x[2:3]), rtol=1e-5, atol=1e-6)


def test_half_keeps_the_scales_in_float32():
    layer, _, _ = make(8)
    before = layer.scale.clone()
    layer.half()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, before)
    assert layer.bias.dtype == torch.float16
    assert layer.q8.dtype == torch.int8


def test_repr_and_refusals():
    layer, packed, tensors = make(4)
    assert repr(layer) == "PackedLinear(100 -> 24, int4 group 32, bias=True, compute=a16)"
    with pytest.raises(ValueError, match="expected 100 input features, found 99"):
        layer(torch.zeros(1, 99))
    with pytest.raises(ValueError, match="q4: expected"):
        PackedLinear.from_tensors(tensors, "a", 128 + 1, 32)
    with pytest.raises(ValueError, match="expected one of a16, a8"):
        PackedLinear.from_tensors(tensors, "a", 100, 32, compute="a4")
    with pytest.raises(ValueError, match="q8, or q4"):
        PackedLinear(100, packed.scale, None)
