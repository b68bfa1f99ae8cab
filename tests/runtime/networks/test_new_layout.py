"""A new weight layout, added as docs/adding.md says, is quantized, packed, inspected, loaded, run
and trained: one row of LAYOUTS, and the byte order of its codes in PACK and UNPACK."""

from dataclasses import replace

import pytest
import torch
from tiny_model import tiny_checkpoint
from torch import nn

from vitapack.compressor.distill.trained_linear import TrainedLinear
from vitapack.compressor.packing.compress import compress
from vitapack.compressor.packing.quantizers import QUANTIZERS, rounded
from vitapack.compressor.planning.files import resolve_plan
from vitapack.kernels.linear import dispatch, gpu_ops, support, weights
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import LAYOUTS, W4, WeightLayout, layout_for
from vitapack.kernels.linear.weights import check, dequantize, expand, from_codes, pack_group
from vitapack.runtime.engines import gpu_dit
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.pipeline.load import load_dit
from vitapack.runtime.tools.tune import shapes_of

W3 = WeightLayout("w3-b64-g32-v1", 3, "q3", "U8", block=64, group=32)
BIT = 2 ** torch.arange(8, dtype=torch.uint8)


def pack_planes(codes):
    """Codes 0..7 (N, Kp) to bytes (N, 3 Kp / 8): per 64 inputs three planes of 64 bits."""
    planes = torch.stack([codes >> i & 1 for i in range(3)]).unflatten(2, (-1, 8, 8))
    return (planes * BIT).sum(-1, dtype=torch.uint8).permute(1, 2, 0, 3).flatten(1)


def unpack_planes(packed):
    planes = packed.unflatten(1, (-1, 3, 8))[..., None] & BIT
    bits = (planes != 0).flatten(-2).to(torch.uint8)  # (N, blocks, 3, 64)
    return (bits[:, :, 0] | bits[:, :, 1] << 1 | bits[:, :, 2] << 2).flatten(1)


@pytest.fixture(autouse=True)
def _layout(monkeypatch):
    monkeypatch.setitem(LAYOUTS, W3.id, W3)
    monkeypatch.setitem(weights.PACK, "q3", pack_planes)
    monkeypatch.setitem(weights.UNPACK, "q3", unpack_planes)


def matrix(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("k", [1, 64, 100, 200])
def test_it_expands_exactly(k):
    rng = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 8, (5, W3.padded(k)), generator=rng, dtype=torch.uint8)
    s = torch.randint(1, 17, (5, W3.groups(k)), generator=rng)
    z = torch.randint(0, 8, s.shape, generator=rng)
    assert torch.equal(unpack_planes(pack_planes(codes)), codes)
    weight = from_codes(W3, k, codes, torch.ones(5), pack_group(s, z))
    wide = (codes.int() - z.repeat_interleave(32, 1)) * s.repeat_interleave(32, 1)
    assert torch.equal(expand(weight), wide[:, :k].to(torch.int8))


def test_its_tensors_and_bytes():
    assert W3.tensors(6, 100) == {"q3": ("U8", (6, 48)), "group": ("U8", (6, 4)),
                                  "scale": ("F32", (6,))}  # fmt: skip
    assert list(W3.stored("x.weight", 6, 100)) == ["x.weight.q3", "x.weight.group",
                                                   "x.weight.scale"]  # fmt: skip
    assert W3.nbytes(6, 100) == 6 * (48 + 4 + 4)
    assert (W3.name, W3.largest, layout_for(3, 32)) == ("int3 group 32", 7, W3)


def test_every_quantizer_takes_it():
    weight = matrix(48, 512)
    error = {}
    for name in QUANTIZERS:
        for layout in (W3, W4[0]):
            packed = QUANTIZERS[name]().quantize("x", weight, layout)
            check(packed)
            difference = (dequantize(packed) - weight).norm() / weight.norm()
            error[name, layout.bits] = float(difference)
            again = rounded(dequantize(packed), packed)
            assert torch.equal(again.codes, packed.codes)
        assert error[name, 4] < error[name, 3] < 2.5 * error[name, 4]
    assert error["search", 3] < error["rtn", 3]


def test_it_goes_from_a_plan_through_the_file_to_a_network(tmp_path, caplog):
    checkpoint, original = tiny_checkpoint(tmp_path / "model")
    path = tmp_path / "m.safetensors"
    assert {block.bits for block in resolve_plan("int3", checkpoint).blocks} == {3}
    bits = {("double", 0): 3, ("double", 1): 4, ("single", 0): 3, ("single", 2): 16}
    blocks = tuple(BlockEntry(kind, index, width) for (kind, index), width in bits.items())
    totals = {kind: len(held) for kind, held in checkpoint.config.blocks_by_kind().items()}
    layer_map = LayerMap(checkpoint.family, totals, blocks, how="by hand")
    sizes = compress(checkpoint, layer_map, path, modulation="int8")
    header = read_header(path)
    threes = [name for name in header.linears if header.layout(name) is W3]
    assert {name.rpartition(".")[0].split(".img")[0].split(".txt")[0] for name in threes} == {
        "double_blocks.0", "single_blocks.0",
    }  # fmt: skip
    linears = header.network.linears()
    expected = sum(W3.nbytes(linears[name].out, linears[name].inputs) for name in threes)
    assert sizes.parts["3-bit weights"] == header.sizes().parts["3-bit weights"] == expected
    page = describe(header)
    assert "2 of 2 blocks kept: 1 in 3 bits, 1 in 4 bits (groups of 32)" in page
    assert "2 of 3 blocks kept: 1 in 3 bits, 1 in 16 bits (groups of 32)" in page
    assert "  34\n" in page
    assert "  3.x\n" in page
    mixed = replace(header, linears=header.linears | {threes[0]: "w8-c-v1"})
    assert "1 in 3 and 8 bits, 1 in 4 bits" in describe(mixed)
    assert "  *4\n" in describe(mixed)
    assert W3 not in {layout for *_, layout in shapes_of(path)}  # it has no Triton kernel to tune

    fake = original.without(*((kind, i) for kind in totals for i in layer_map.pruned(kind)))
    for name in header.linears:
        if header.layout(name).packed:
            linear = fake.get_submodule(name)
            packed = QUANTIZERS["search"]().quantize(name, linear.weight, header.layout(name))
            linear.weight.data = dequantize(packed)
    x, t, cond = matrix(14, 4).view(2, 7, 4), torch.full((2,), 0.5), matrix(10, 6).view(2, 5, 6)
    exact = fake(x, t, cond)
    for compute, near in (("a16", 1e-5), ("a8", 0.03)):
        support.announce.cache_clear()
        caplog.clear()
        network = load_dit(path, compute=compute)
        forms = {name: type(network.get_submodule(name)) for name in header.linears}
        assert {forms[name] for name in threes} == {PackedLinear}
        assert {forms[n] for n in forms if header.layout(n) in W4} == {CpuLinear}
        assert f"does not read layout {W3.id}; slow" in caplog.text
        with torch.no_grad():
            found = network(x, t, cond)
        assert (found - exact).norm() <= near * exact.norm()


def test_operators_and_the_fused_form_take_it_plainly(monkeypatch):
    weight = QUANTIZERS["search"]().quantize("x", matrix(20, 100), W3)
    x, bias = matrix(6, 100, seed=1), matrix(1, 20, seed=2)[0]
    exact = x @ dequantize(weight).t() + bias
    torch.testing.assert_close(gpu_ops.gemm(x, None, weight, Epilogue(bias), x.dtype), exact)
    assert torch.equal(gpu_ops.expand(weight, torch.int8), expand(weight))
    linear = PackedLinear(weight, bias, "a8")
    assert not gpu_dit.fused(linear)
    rows = gpu_dit.quantized(linear, x[None])
    torch.testing.assert_close(gpu_dit.project(linear, rows, x[None])[0], linear(x))
    assert dispatch.linear(x, weight, bias, "a16").equal(nn.functional.linear(
        x, dequantize(weight), bias))  # fmt: skip


def test_it_is_trained_on_its_own_grid():
    original = matrix(24, 100)
    packed = PackedLinear(QUANTIZERS["search"]().quantize("x", original, W3), None)
    trained, x = TrainedLinear(packed, original), matrix(5, 100, seed=3)
    torch.testing.assert_close(trained(x), packed(x), rtol=1e-5, atol=1e-6)
    assert set(trained.stored()) == {"weight.q3", "weight.group", "weight.scale"}
