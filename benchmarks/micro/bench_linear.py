"""Linears and attention on this CPU: int8, int4, weight-only, plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cpu.run import packed
from vitapack.kernels.linear import cpu, reference
from vitapack.kernels.linear.layouts import W8, layout_for
from vitapack.kernels.linear.weights import int8_weight

SHAPES = [(1, 1024, 3072), (128, 1024, 3072), (1024, 1024, 1024)]  # rows, K, N
DTYPE = torch.bfloat16


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request):
    return request.param


@pytest.mark.parametrize("layout", [W8, layout_for(4, 64)], ids=["w8", "w4"])
def bench_int8_activations(benchmark, shape, layout):
    m, k, n = shape
    benchmark(cpu.linear_a8, torch.randn(m, k, dtype=DTYPE), packed(n, k, layout))


def bench_weight_only(benchmark, shape):
    m, k, n = shape
    benchmark(cpu.linear_a16, torch.randn(m, k, dtype=DTYPE), packed(n, k, W8))


def bench_torch(benchmark, shape):
    m, k, n = shape
    benchmark(F.linear, torch.randn(m, k, dtype=DTYPE), torch.randn(n, k, dtype=DTYPE))


def bench_reference(benchmark):
    codes = torch.randint(-127, 128, (256, 256), dtype=torch.int8)
    weight = int8_weight(codes, torch.rand(256))
    benchmark(reference.linear_w8a8_ref, torch.randn(64, 256), weight, None)


@pytest.mark.parametrize("tokens", [128, 1024])
def bench_attention(benchmark, tokens):
    attention = cpu.Attention(1, tokens, 16, 64)
    benchmark(attention, torch.randn(1, tokens, 3, 16, 64))


def bench_quantization(benchmark):
    benchmark(cpu.quantize_activations, torch.randn(1024, 1024, dtype=DTYPE))
