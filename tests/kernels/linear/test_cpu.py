"""The int8 engine against the reference kernels, on every instruction set of this CPU, forced."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from vitapack.kernels.linear import cpu, reference
from vitapack.kernels.linear.layouts import LAYOUTS, W4, WeightLayout
from vitapack.kernels.linear.weights import (
    PackedWeight,
    expand,
    from_codes,
    int8_weight,
    pack_group,
)

SETS = cpu.instruction_sets()
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (7, 64, 64),
    (13, 70, 130),
    (200, 129, 300),
    (0, 4, 8),
    (5, 3, 1100),
]


def int8(n, k, seed=0):
    """A random weight and bias."""
    rng = torch.Generator().manual_seed(seed)
    q8 = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
    scale, bias = torch.rand(n, generator=rng) * 0.01, torch.randn(n, generator=rng)
    return int8_weight(q8, scale), bias


def int4(n, k, layout, scale, seed=0, largest=8):
    """Random codes and groups, padding that expands to 0."""
    rng = torch.Generator().manual_seed(seed)
    padded, count = layout.padded(k), layout.groups(k)
    s = torch.randint(1, largest + 1, (n, count), generator=rng)
    z = torch.randint(0, 16, (n, count), generator=rng)
    codes = torch.randint(0, 16, (n, padded), generator=rng, dtype=torch.uint8)
    zeros = z.repeat_interleave(layout.group, 1)[:, :padded].to(torch.uint8)
    codes[:, k:] = zeros[:, k:]
    return from_codes(layout, k, codes, scale, pack_group(s, z))


def activations(m, k, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bit_equal_to_the_reference(isa, shape):
    m, n, k = shape
    weight, bias = int8(n, k)
    panels = cpu.pack(weight, bias)
    again, again_bias = panels.unpacked()
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again_bias, bias)
    x = activations(m, k)
    xq, sx = reference.quantize_activations(x)
    ours_q, ours_s = cpu.quantize_activations(x)
    assert torch.equal(ours_q, xq)
    assert torch.equal(ours_s, sx)
    assert torch.equal(cpu.accumulate(xq, panels), reference.int8_matmul(xq, weight.codes))
    torch.testing.assert_close(
        cpu.linear_a8(x, panels),
        reference.linear_w8a8_ref(x, weight, bias),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", W4, ids=lambda layout: layout.id)
def test_int4_expands_to_the_same_integers(isa, shape, layout):
    m, n, k = shape
    weight = int4(n, k, layout, torch.rand(n) * 0.01)
    panels = cpu.pack(weight)
    again, bias = panels.unpacked()
    assert bias is None
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.group, weight.group)
    assert torch.equal(again.scale, weight.scale)
    x = activations(m, k)
    xq, _ = reference.quantize_activations(x)
    assert torch.equal(cpu.accumulate(xq, panels), reference.int8_matmul(xq, expand(weight)))
    ours, theirs = cpu.linear_a8(x, panels), reference.linear_w8a8_ref(x, weight, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wide = reference.linear_a16_ref(x, weight, None)
    torch.testing.assert_close(cpu.linear_a16(x, panels), wide, rtol=1e-4, atol=1e-4)


def test_int4_that_overflows_wraps_as_the_reference_does(isa):
    weight = int4(64, 192, LAYOUTS["w4-b64-g64-v1"], torch.ones(64), largest=16)
    w8 = expand(weight)
    assert int(w8.min()) == -128
    xq, _ = reference.quantize_activations(activations(3, 192))
    exact = (xq.double() @ w8.double().t()).int()
    assert torch.equal(cpu.accumulate(xq, cpu.pack(weight)), exact)


def test_the_largest_sums_do_not_overflow(isa):
    k = 33000  # beyond 2^31 / (255 * 255): an accumulator that saturated would be caught
    q8 = torch.full((2, k), 127, dtype=torch.int8)
    q8[1] = -127
    xq = torch.full((1, k), 127, dtype=torch.int8)
    panels = cpu.pack(int8_weight(q8, torch.ones(2)))
    assert cpu.accumulate(xq, panels).tolist() == [[127 * 127 * k, -127 * 127 * k]]
    assert cpu.accumulate(-xq, panels).tolist() == [[-127 * 127 * k, 127 * 127 * k]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_tokens(isa, dtype):
    x = activations(9, 100).to(dtype)
    x[0] = 0
    x[1] = 448 * torch.sign(x[1])
    x[2, 3] = 448  # an outlier
    x[3] = 0
    x[3, 5] = 1e-42 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal
    x[4, 99] = float("nan")
    x[5, 0] = float("inf")
    x[6, 50] = -float("inf")
    x[7] = torch.finfo(dtype).max
    weight, bias = int8(70, 100)
    panels = cpu.pack(weight, bias)
    xq, sx = reference.quantize_activations(x)
    ours_q, ours_s = cpu.quantize_activations(x)
    assert torch.equal(ours_q, xq)
    torch.testing.assert_close(ours_s, sx, rtol=0, atol=0, equal_nan=True)
    ours = cpu.linear_a8(x, panels)
    theirs = reference.linear_w8a8_ref(x, weight, bias)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.isnan(ours[4:7]).all()
    assert torch.isnan(cpu.linear_a16(x, panels)[4:7]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_is_as_exact_as_torch(isa, dtype):
    weight, bias = int8(70, 600)
    x = activations(13, 600).to(dtype)
    panels = cpu.pack(weight, bias)
    dense = weight.codes.double() * weight.scale.double()[:, None]
    exact = x.double() @ dense.t() + bias.double()
    theirs = (reference.linear_a16_ref(x, weight, bias.to(dtype)).double() - exact).norm()
    for bf16 in (False, True) if dtype == torch.bfloat16 and cpu.has_bf16() else (False,):
        ours = (cpu.linear_a16(x, panels, bf16=bf16).double() - exact).norm()
        assert ours <= 2 * theirs


def test_bf16_products_only_where_there_are_some(isa):
    panels = cpu.pack(int8_weight(torch.ones(2, 64, dtype=torch.int8), torch.ones(2)))
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert cpu.linear_a16(x, panels).tolist() == [[64.0, 64.0]]
    if not cpu.has_bf16():
        assert not cpu.bf16_pays()
        with pytest.raises(ValueError, match="no bf16 products"):
            cpu.linear_a16(x, panels, bf16=True)


def test_strides_and_gelu(isa):
    weight, bias = int8(66, 100)
    panels = cpu.pack(weight, bias)
    wide = activations(40, 300)
    for x in (
        wide[:, 50:150],
        wide[::3, :100],
        activations(100, 7).t(),
        wide[:1, :100].expand(4, 100),
    ):
        plain = reference.linear_w8a8_ref(x, weight, bias)
        torch.testing.assert_close(cpu.linear_a8(x, panels), plain, rtol=1e-5, atol=1e-5)
        bent = torch.nn.functional.gelu(plain, approximate="tanh")
        torch.testing.assert_close(cpu.linear_a8(x, panels, gelu=True), bent, rtol=1e-4, atol=1e-5)


def test_gelu_of_any_number(isa):
    # One input and weight 1: the linear passes x through, whatever its size.
    one = torch.full((1, 1), 127, dtype=torch.int8)
    panels = cpu.pack(int8_weight(one, torch.tensor([1 / 127])))
    x = torch.cat([torch.linspace(-12, 12, 999), torch.tensor([-1e30, 1e30, 0.0, 1e-30])])[:, None]
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    ours = cpu.linear_a8(x, panels, gelu=True)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)


def test_modulated_norm(isa):
    x = activations(11, 200) * 3 + 5
    shift, scale = activations(2, 200, seed=5)
    exact = (1 + scale) * torch.nn.functional.layer_norm(x, (200,), eps=1e-6) + shift
    xq, sx = cpu.modulate_quantize(x, shift, scale)
    error = (xq * sx - exact).abs()
    assert bool((error <= 0.501 * sx + 1e-5).all())
    x[3, 7] = float("nan")
    _, sx = cpu.modulate_quantize(x, shift, scale)
    assert torch.isnan(sx).flatten().tolist() == [i == 3 for i in range(11)]


def attention_of(qkv, query_norm=None, key_norm=None):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if query_norm is not None:
        q, k = (
            part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6) * weight
            for part, weight in ((q, query_norm), (k, key_norm))
        )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 4), (2, 70, 3, 20), (1, 300, 2, 64), (1, 850, 1, 64), (1, 131, 1, 128)],
)
def test_attention(isa, shape):
    batch, tokens, heads, dim = shape
    rng = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=rng)
    norms = torch.rand(2, dim, generator=rng) + 0.5
    attend = cpu.Attention(batch, tokens, heads, dim)
    for weights in ((), tuple(norms)):
        exact = attention_of(qkv, *weights)
        ours = attend(qkv, *weights)
        # int8 operands: 1.4 % on normal numbers, where nothing averages out.
        assert (ours - exact).norm() <= 0.016 * exact.norm()


def test_attention_with_a_sink_and_zero_values(isa):
    """A token with most of the probability and no value must not cost the others their bits."""
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 200, 3, 1, 64, generator=rng)
    qkv[0, 150, 1] = 12 * qkv[0, :, 0].mean(0) + 3  # every query looks at it
    qkv[0, :, 0] += 2
    qkv[0, 150, 2] = 0
    exact = attention_of(qkv)
    ours = cpu.Attention(1, 200, 1, 64)(qkv)
    assert torch.isfinite(ours).all()
    assert (ours - exact).norm() <= 0.05 * exact.norm()
    qkv[:, :, 2] = 0
    assert not cpu.Attention(1, 200, 1, 64)(qkv).any()


@pytest.mark.parametrize("dim", [16, 64])  # 64: four tokens are quantized together
def test_attention_of_nan(isa, dim):
    qkv = torch.randn(1, 40, 3, 2, dim)
    qkv[0, 7, 0, 0, 3] = float("nan")  # a query: its row of that head alone
    out = cpu.Attention(1, 40, 2, dim)(qkv)
    wrong = torch.isnan(out)[0]
    assert wrong[7, :dim].all()
    assert int(wrong.sum()) == dim
    qkv[0, 9, 1, 1, 0] = float("nan")  # a key: all rows of its head
    qkv[0, 9, 2, 0, 0] = float("inf")  # a value
    assert torch.isnan(cpu.Attention(1, 40, 2, dim)(qkv)).all()


def test_results_do_not_depend_on_the_threads(isa):
    panels = cpu.pack(*int8(200, 128))
    x, qkv = activations(500, 128), torch.randn(2, 150, 3, 2, 32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((cpu.linear_a8(x, panels), cpu.Attention(2, 150, 2, 32)(qkv)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])


def test_many_callers_at_once():
    from concurrent.futures import ThreadPoolExecutor

    panels = cpu.pack(*int8(200, 128))
    inputs = [activations(50 + i, 128, seed=i) for i in range(16)]
    alone = [cpu.linear_a8(x, panels) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: cpu.linear_a8(x, panels), inputs * 4))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 4, strict=True))


def test_a_linear_does_not_wait_for_another_threads():
    """A small linear starts after the first rows of a large one are written, and ends before the
    last ones are: no time is compared. The large one is run again if the system let it end first.
    """
    large, small = cpu.pack(*int8(512, 1024)), cpu.pack(*int8(64, 1024))
    wide, row = activations(800, 1024), activations(1, 1024)
    cpu.use_instruction_set("portable")  # the slowest, so that the large one takes long
    try:
        alone = cpu.linear_a8(wide, large), cpu.linear_a8(row, small)
        for _ in range(5):
            out = torch.full((800, 512), float("nan"))
            worker = threading.Thread(target=lambda out=out: cpu.linear_a8(wide, large, out=out))
            worker.start()
            while out[0, 0].isnan():
                pass
            meanwhile = cpu.linear_a8(row, small)
            overlapped = bool(out[-1, -1].isnan())
            worker.join()
            assert torch.equal(meanwhile, alone[1])
            assert torch.equal(out, alone[0])
            if overlapped:
                return
    finally:
        cpu.use_instruction_set("")
    pytest.fail("the small linear ended after the large one, five times")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_whatever_its_parent_was_at(isa):
    """Threads of the parent hold memory and pools of the engine, which no child returns."""
    panels = cpu.pack(*int8(256, 256))
    x = activations(64, 256)
    stop, before = threading.Event(), torch.get_num_threads()

    def run():
        while not stop.is_set():
            cpu.linear_a8(x, panels)

    torch.set_num_threads(2)
    expected = cpu.linear_a8(x, panels).tolist()
    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            child = os.fork()
            if child == 0:  # no test machinery here: a code, and out
                signal.alarm(60)
                same = [cpu.linear_a8(x, panels).tolist() == expected for _ in range(9)]
                os._exit(0 if all(same) else 3)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)


def test_the_variable_forces_a_set_and_refuses_unknown_ones():
    code = "from vitapack.kernels.linear import cpu; print(cpu.instruction_set())"

    def run(name):
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"VITAPACK_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run("portable").stdout.strip() == "portable"
    wrong = run("mmx")
    assert wrong.returncode != 0
    assert f"VITAPACK_ISA='mmx': no instruction set 'mmx' here: choose one of {SETS[0]}" in (
        wrong.stderr
    )


def test_refusals():
    panels = cpu.pack(int8(4, 8)[0])
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 8\)"):
        cpu.linear_a8(torch.zeros(2, 9), panels)
    with pytest.raises(TypeError, match="float64"):
        cpu.linear_a8(torch.zeros(2, 8, dtype=torch.float64), panels)
    with pytest.raises(ValueError, match="overflow"):
        cpu.pack(int8_weight(torch.zeros(1, 140000, dtype=torch.int8), torch.ones(1)))
    other = WeightLayout("w4-b64-g48-v1", 4, "q4", "U8", block=64, group=48)
    with pytest.raises(ValueError, match=r"does not read layout w4-b64-g48-v1 \(int4 group 48\)"):
        cpu.pack(int4(1, 8, other, torch.ones(1)))
    with pytest.raises(ValueError, match="a weight in w4-b64-g32-v1 holds q4, group, scale"):
        cpu.pack(PackedWeight(W4[0], {"scale": torch.ones(1)}, 8))
    away = int8_weight(torch.zeros(1, 8, dtype=torch.int8, device="meta"), torch.ones(1))
    with pytest.raises(ValueError, match="expected a weight on cpu, found one on meta"):
        cpu.pack(away)
