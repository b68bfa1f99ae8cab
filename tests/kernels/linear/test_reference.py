"""Packing, exact expansion and the integer arithmetic of the reference kernels."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitapack.kernels.linear import dispatch, reference, support, weights
from vitapack.kernels.linear.layouts import W4
from vitapack.kernels.linear.weights import PackedWeight, int8_weight


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 9), blocks=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_pack_round_trip(rows, blocks, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, blocks * 64), generator=rng, dtype=torch.uint8)
    packed = weights.pack_int4(codes)
    assert packed.shape == (rows, blocks * 32)
    assert torch.equal(weights.unpack_int4(packed), codes)
    assert torch.equal(weights.pack_int4(weights.unpack_int4(packed)), packed)


def test_byte_j_holds_inputs_j_and_j_plus_32():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 64 + 5], codes[0, 64 + 37] = 3, 9
    packed = weights.pack_int4(codes)
    assert packed[0, 32 + 5] == 3 | (9 << 4)
    assert int((packed != 0).sum()) == 1


@pytest.mark.parametrize("layout", W4, ids=lambda layout: layout.id)
@pytest.mark.parametrize("k", [1, 33, 64, 100, 160, 192, 256])
def test_expansion_is_the_integer_formula(layout, k):
    rng = np.random.default_rng(k * layout.group)
    padded, groups = layout.padded(k), layout.groups(k)
    codes = rng.integers(0, 16, (5, padded))
    z = rng.integers(0, 16, (5, groups))
    # s small enough that nothing leaves int8, as the quantizer guarantees.
    s = rng.integers(1, 9, (5, groups))
    expected = np.empty((5, k), np.int64)
    for i in range(k):
        expected[:, i] = s[:, i // layout.group] * (codes[:, i] - z[:, i // layout.group])
    group = weights.pack_group(torch.from_numpy(s), torch.from_numpy(z))
    codes = torch.from_numpy(codes.astype(np.uint8))
    w8 = weights.expand(weights.from_codes(layout, k, codes, torch.ones(5), group))
    assert w8.dtype == torch.int8
    assert np.array_equal(w8.numpy(), expected)


def test_check_int4_finds_overflow_and_dirty_padding():
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 0] = 15
    group = torch.full((1, 2), 15 << 4, dtype=torch.uint8)  # s = 16, z = 0: 240
    with pytest.raises(ValueError, match="int4 group 32 expands to 240, beyond 127"):
        weights.check(weights.from_codes(W4[0], 64, codes, torch.ones(1), group))
    codes[0, 0], codes[0, 50] = 0, 1
    with pytest.raises(ValueError, match="padding"):
        weights.check(weights.from_codes(W4[0], 40, codes, torch.ones(1), group % 16))
    low = torch.full((1, 8), -128, dtype=torch.int8)
    with pytest.raises(ValueError, match="int8 expands to 128, beyond 127"):
        weights.check(int8_weight(low, torch.ones(1)))


def test_other_tensors_than_the_layouts_are_refused():
    codes, group = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8)
    tensors = {"q4": codes, "group": group, "scale": torch.ones(3)}
    assert weights.expand(PackedWeight(W4[0], tensors, 40)).shape == (3, 40)
    for name, wrong in (
        ("q4", codes.to(torch.int8)), ("q4", codes[:, :20]), ("group", group[:, :1]),
        ("group", group[:2]), ("scale", torch.ones(3).half()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} in w4-b64-g32-v1: expected torch"):
            weights.expand(PackedWeight(W4[0], tensors | {name: wrong}, 40))
    with pytest.raises(ValueError, match="holds q4, group, scale; found q4, scale"):
        weights.expand(PackedWeight(W4[0], {"q4": codes, "scale": torch.ones(3)}, 40))


@pytest.mark.parametrize("bad", [torch.zeros(2, 63, dtype=torch.uint8), torch.zeros(2, 64)])
def test_pack_refuses_other_shapes_and_dtypes(bad):
    with pytest.raises(ValueError, match="int4 codes must be uint8"):
        weights.pack_int4(bad)


def test_pack_refuses_codes_above_15():
    with pytest.raises(ValueError, match="found 16"):
        weights.pack_int4(torch.full((1, 64), 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (17, 33, 1025), (2, 3, 6400), (0, 4, 8)]
)
@pytest.mark.parametrize("vnni", [False, True])
def test_int8_matmul_is_exact(m, n, k, vnni, monkeypatch):
    if vnni and not reference._exact_int_mm():
        pytest.skip("this CPU has no VNNI: torch._int_mm is not used here")
    monkeypatch.setattr(reference, "_exact_int_mm", lambda: vnni)
    rng = np.random.default_rng(k)
    x, w = rng.integers(-127, 128, (m, k)), rng.integers(-127, 128, (n, k))
    x[: m // 2], w[: n // 2] = 127, -127  # the extreme sums
    out = reference.int8_matmul(
        torch.from_numpy(x.astype(np.int8)), torch.from_numpy(w.astype(np.int8))
    )
    assert out.dtype == torch.int32
    assert np.array_equal(out.numpy(), x @ w.T)


def test_int8_matmul_refuses_overflow():
    wide = torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow"):
        reference.int8_matmul(wide, wide)


@settings(max_examples=40, deadline=None)
@given(
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 448.0, 1e30]),
    tokens=st.integers(0, 4),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_activations_are_within_half_a_step(scale, tokens, k, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=rng) * scale
    xq, sx = reference.quantize_activations(x)
    assert xq.shape == x.shape
    assert sx.shape == (tokens, 1)
    error = (xq.double() * sx.double() - x.double()).abs()
    assert bool((error <= 0.5001 * sx.double()).all())
    if tokens:
        assert int(xq.abs().amax(1).min()) == 127  # the peak of a token uses the whole range


def test_zero_denormal_and_broken_tokens():
    x = torch.zeros(4, 8)
    x[1, 3] = 1e-42
    x[2, 0] = float("nan")
    x[3, 0] = float("inf")
    xq, sx = reference.quantize_activations(x)
    assert sx[0] == 0
    assert not xq[0].any()
    assert torch.isfinite(sx[1])
    assert torch.isnan(sx[2:]).all()
    ones = int8_weight(torch.ones(2, 8, dtype=torch.int8), torch.ones(2))
    out = reference.linear_w8a8_ref(x, ones, None)
    assert not out[0].any()
    assert torch.isnan(out[2:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_w8a8_epilogue(dtype):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, generator=rng).to(dtype)
    w8 = torch.randint(-127, 128, (6, 40), generator=rng, dtype=torch.int8)
    scale, bias = torch.rand(6, generator=rng) * 0.01, torch.randn(6, generator=rng)
    out = reference.linear_w8a8_ref(x, int8_weight(w8, scale), bias)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 6)
    xq, sx = reference.quantize_activations(x)
    exact = (xq.double() @ w8.double().t()) * sx.double() * scale.double() + bias.double()
    torch.testing.assert_close(
        out.double(),
        exact,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
        rtol=1e-5 if dtype == torch.float32 else 1e-2,
    )


def test_dispatch_says_its_path_once(caplog):
    support.announce.cache_clear()
    x, weight = torch.ones(2, 8), int8_weight(torch.ones(3, 8, dtype=torch.int8), torch.ones(3))
    with caplog.at_level(logging.INFO, logger="vitapack.kernels"):
        for _ in range(3):
            dispatch.linear(x, weight, None, "a16")
            dispatch.linear(x, weight, None, "a8")
    assert len(caplog.messages) == 2
    assert all("plain PyTorch" in message for message in caplog.messages)
