"""Quantizers: exact integer expansion, error ordering, and the awkward matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_checkpoint, tiny_map

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import QUANTIZERS, Quantizer, rounded
from vitapack.kernels.linear.layouts import LAYOUTS, W4, W8
from vitapack.kernels.linear.weights import check, dequantize, expand
from vitapack.runtime import choices
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.header import read_header

PACKED = [layout for layout in LAYOUTS.values() if layout.packed]
GROUPED = [layout for layout in PACKED if layout.group]
BY_ID = {"ids": lambda layout: layout.id}


def quantize(name, weight, layout):
    return QUANTIZERS[name]().quantize("x", weight, layout)


def relative(weight, quantized):
    return ((dequantize(quantized) - weight).norm() / weight.norm()).item()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("layout", PACKED, **BY_ID)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (7, 64), (5, 100), (6, 192), (9, 640)])
def test_shapes_and_exact_expansion(name, layout, shape):
    weight = normal(*shape)
    result = quantize(name, weight, layout)
    assert result.checked().in_features == shape[1]
    assert result.layout is layout
    check(result)  # +-127, padding expands to 0
    assert torch.equal(dequantize(result), expand(result).float() * result.scale[:, None])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(QUANTIZERS)),
    rows=st.integers(1, 5),
    k=st.integers(1, 200),
    layout=st.sampled_from(GROUPED),
    tail=st.floats(0.3, 30),
    offset=st.sampled_from([0.0, 0.0, 0.1, -3.0]),
    size=st.sampled_from([1e-20, 1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_matrix_keeps_the_exact_property(name, rows, k, layout, tail, offset, size, seed):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, k, generator=rng)
    weight = (weight.sign() * weight.abs() ** tail + offset) * size
    for result in (quantize(name, weight, layout), quantize(name, weight, W8)):
        check(result)
        assert torch.isfinite(result.scale).all()
        assert (result.scale > 0).all()
        # No row may be worse than rounding everything to zero.
        assert ((dequantize(result) - weight).norm(dim=1) <= 1.0001 * weight.norm(dim=1)).all()


def test_normal_weights_reach_the_expected_error():
    weight = normal(64, 1024)
    for name in QUANTIZERS:
        assert relative(weight, quantize(name, weight, W8)) < 0.0085
    # Free real-valued group steps reach 0.0768 / 0.0870 / 0.0950: integer ones cost 1 to 3 %.
    for layout, limit in zip(W4, (0.0805, 0.0895, 0.0970), strict=True):
        assert relative(weight, quantize("search", weight, layout)) < limit


@pytest.mark.parametrize("layout", W4, **BY_ID)
def test_search_beats_rounding_on_every_kind_of_row(layout):
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(48, 512, generator=rng)
    for weight in (base, base.abs() ** 2 * base.sign(), base.abs(), base * torch.rand(48, 1)):
        rtn, search = (
            (dequantize(quantize(name, weight, layout)) - weight).square().sum(1)
            for name in ("rtn", "search")
        )
        assert (search <= rtn * 1.001).float().mean() > 0.95
        assert (search <= rtn * 1.02).all()
        assert search.sum() < 0.97 * rtn.sum()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zero_and_constant_rows_and_a_huge_outlier(name):
    weight = normal(4, 128, seed=3)
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -5e-3
    weight[3, 7] = 50.0
    int8, int4 = (dequantize(quantize(name, weight, layout)) for layout in (W8, W4[0]))
    for back in (int8, int4):
        assert not back[0].any()
        # Plain rounding may clip by half a step of its integer group scale, 1 / (2 s).
        limit = 0.06 if name == "rtn" else 1e-4
        assert (back[1] - 0.37).abs().max() <= 0.37 * limit
        assert (back[2] + 5e-3).abs().max() <= 5e-3 * limit
        assert abs(back[3, 7] - 50.0) < 50 * max(limit, 0.01)
    # A row's outlier must not spoil its neighbours.
    alone = dequantize(quantize(name, weight[1:2], W4[0]))
    assert torch.equal(alone, int4[1:2])


def test_half_precision_weights_are_taken_as_they_are():
    weight = normal(8, 96).half()
    for name in QUANTIZERS:
        wide, half = quantize(name, weight.float(), W4[0]), quantize(name, weight, W4[0])
        assert torch.equal(wide.codes, half.codes)
        assert torch.equal(wide.scale, half.scale)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_broken_weights_are_refused_by_name(name, bad):
    weight = normal(4, 64)
    weight[2, 5] = bad
    for layout in (W8, W4[0]):
        with pytest.raises(UserError, match=r"blocks\.3\.x: 1 of 256 .* at \[2, 5\]"):
            QUANTIZERS[name]().quantize("blocks.3.x", weight, layout)


def test_empty_rows():
    for name in QUANTIZERS:
        assert quantize(name, torch.zeros(0, 64), W4[0]).codes.shape == (0, 32)
        assert quantize(name, torch.zeros(0, 64), W8).codes.shape == (0, 64)


@pytest.mark.parametrize("layout", PACKED, **BY_ID)
def test_rounding_on_a_grid_that_is_there(layout):
    """A weight comes back from its own grid, and another one keeps scales and zero points."""
    grid = quantize("search", normal(20, 100), layout)
    again = rounded(dequantize(grid), grid)
    assert all(torch.equal(again.tensors[name], grid.tensors[name]) for name in layout.names)
    other = rounded(normal(20, 100, seed=1), grid)
    assert torch.equal(other.scale, grid.scale)
    assert layout.group == 0 or torch.equal(other.group, grid.group)
    assert not torch.equal(other.codes, grid.codes)
    check(other)


def test_a_calibrated_quantizer_sees_the_model_first(tmp_path, monkeypatch):
    """`prepare` comes once, before the first weight; what it leaves is there in `quantize`."""
    seen = []

    class Noting(Quantizer):
        def prepare(self, checkpoint, calibration):
            assert not seen
            self.family = checkpoint.family
            seen.append((self.family, calibration))

        def quantize(self, name, weight, layout):
            seen.append((self.family, name))
            return QUANTIZERS["rtn"]().quantize(name, weight, layout)

    monkeypatch.setitem(QUANTIZERS, "noting", Noting)
    monkeypatch.setattr(choices, "QUANTIZERS", tuple(QUANTIZERS))
    checkpoint, _ = tiny_checkpoint(tmp_path / "model")
    compress(checkpoint, tiny_map(4), tmp_path / "m.safetensors", quantizer="noting")
    assert seen[0] == ("hunyuan3d", None)
    linears = read_header(tmp_path / "m.safetensors").linears
    assert {name for _, name in seen[1:]} == {f"{name}.weight" for name in linears}
