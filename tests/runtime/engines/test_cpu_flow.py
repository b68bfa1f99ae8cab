"""TRELLIS' fused flow transformer against the readable one, at odd numbers of tokens."""

import copy

import pytest
import torch
from alive_tensors import peak
from readable import readable

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.tools.random_checkpoint import Sizes, write
from vitapack.kernels.linear.cpu_plans import FlowPlan
from vitapack.runtime.condition.dinov2 import Dinov2Config
from vitapack.runtime.engines.cpu_flow import CpuFlow, fused
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.networks.flow import FlowTransformer
from vitapack.runtime.pipeline.load import load_dit

CHANNELS = 72  # of the condition: no multiple of 64
SIDE = 7  # 343 tokens


def layer_map(*bits):
    blocks = [BlockEntry("block", i, b) for i, b in enumerate(bits) if b]
    return LayerMap("trellis", {"block": len(bits)}, tuple(blocks), how="by hand")


CASES = {  # heads of a whole panel, and of less
    "int8": (128, 2, layer_map(8, 8), "trellis-ss"),
    "mixed": (120, 3, layer_map(8, 0, 16, 4), "trellis-ss"),
    "slat": (128, 2, layer_map(8, 4), "trellis-slat"),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def paths(case, tmp_path_factory):
    """The original and the packed file."""
    hidden, heads, plan, model = CASES[case]
    folder = tmp_path_factory.mktemp(case)
    encoder = Dinov2Config(CHANNELS, 1, 2, 14, 2, 4, 4, swiglu=False)
    sizes = Sizes(hidden, heads, (plan.totals["block"],), SIDE, encoder=encoder)
    write(model, folder, parts=("dit",), sizes=sizes)
    compress(open_checkpoint(folder), plan, folder / "m.safetensors", steps=[6])
    return folder, folder / "m.safetensors"


def load(path, **how):
    """With norms that differ from head to head and channel to channel more than rounding does."""
    network = load_dit(path, **how)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith(("query_norm.scale", "key_norm.scale", "cross_norm.weight")):
            parameter.copy_(0.2 + 1.6 * torch.rand(parameter.shape, generator=rng))
        elif name.endswith("cross_norm.bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return network


@pytest.fixture
def engine(paths):
    return load(paths[1], compute="a8")


def inputs(network, condition=131, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    config = network.config
    shape = (8, SIDE, SIDE, SIDE) if config.in_channels else (211, config.hidden)
    x = torch.randn(batch, *shape, generator=rng)
    t = torch.full((batch,), 1000.0, dtype=torch.float64)
    return x, t, torch.randn(batch, condition, CHANNELS, generator=rng)


def error(found, exact):
    return float((found.float() - exact).norm() / exact.norm())


def test_fused_is_as_near_as_the_readable_form(isa, paths, engine):
    exact = load(paths[1])
    assert isinstance(engine, CpuFlow)
    for condition in (131, 1):
        args = inputs(engine, condition, batch=1)
        reference = exact(*args)
        readable_form = readable(FlowTransformer, engine, *args)
        ours = engine(*args)
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
        # The readable form quantizes activations, but not attention.
        assert error(ours, reference) <= 2 * error(readable_form, reference) + 1e-3


def test_eight_bits_are_as_near_as_bf16(case, paths, engine):
    if case != "int8":
        pytest.skip("4 bits are what their weights make of it")
    args = x, t, cond = inputs(engine)
    exact = load(paths[0])(*args)
    half = load(paths[0], dtype=torch.bfloat16)(x.bfloat16(), t, cond.bfloat16())
    assert error(engine(*args), exact) <= 2 * error(half, exact)


def test_short_queries_and_keys_have_their_length_too(isa, engine):
    """q and k are divided by their length, whatever it is: no epsilon of an RMSNorm."""
    args = inputs(engine, batch=1)
    before = engine(*args)
    for block in engine.blocks.values():
        if fused(block):
            linear = block.self_attn.qkv
            weight, bias = linear.packed(), linear.bias.clone()
            short = 2 * linear.in_features
            weight.scale[:short] *= 2**-20  # exact, also in what follows
            bias[:short] *= 2**-20
            block.self_attn.qkv = CpuLinear(weight, bias, linear.compute)
    assert torch.equal(engine(*args), before)


def test_a_batch_is_its_entries(case, engine, monkeypatch):
    if case == "mixed":
        pytest.skip("torch's own products differ in their last bit with the batch")
    x, t, cond = inputs(engine, batch=3)
    when = engine.step_modulation(t[:1])
    monkeypatch.setattr(engine, "step_modulation", lambda t, guidance: when)
    whole = engine(x, t, cond)
    for i in range(3):
        alone = engine(x[i : i + 1], t, cond[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)
    shared = engine(x, t, cond[:1])
    torch.testing.assert_close(shared[0], whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared, engine(x, t, cond[:1].expand(3, -1, -1)))


@pytest.mark.parametrize("condition", [131, 1])
def test_threads_do_not_change_a_bit(condition, engine, monkeypatch):
    args = inputs(engine, condition)
    found = []
    for threads in (1, 2, 5):  # of the engine: torch's own matrix products do change with theirs
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(engine(*args))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_scratch_is_planned_once(engine):
    args = inputs(engine)
    before = engine(*args)
    plan, size = engine.scratch.plan, engine.scratch.nbytes
    assert size == plan.nbytes > 0
    engine(*inputs(engine, 1))  # a guided step's second call
    engine(*args)
    assert engine.scratch.plans == [plan]
    assert engine.scratch.nbytes == size
    engine(*inputs(engine, 300))  # another picture's tokens: more keys and values
    assert engine.scratch.plans == [plan]
    assert engine.scratch.nbytes > size
    assert torch.equal(engine(*args), before)
    assert engine.scratch.nbytes == size
    assert torch.equal(copy.deepcopy(engine)(*args), before)


def test_a_call_allocates_its_patches_and_its_output(case, engine):
    if case != "int8":
        pytest.skip("a block with 16-bit linears runs in the readable form; SLAT's x is its tokens")
    held = []
    for batch in (1, 3):
        args = inputs(engine, batch=batch)
        engine(*args)  # plans its memory, which is torch's neither then nor later
        held.append(peak(engine, *args) - sum(part.nbytes for part in args))
    output = 8 * SIDE**3 * 4
    assert held[1] - held[0] <= 2 * 3 * output + 5000  # as tokens, and as a cube; modulation


@pytest.mark.parametrize("condition", [131, 1])
def test_nan_stays_visible(isa, engine, condition):
    x, t, cond = inputs(engine, condition)
    x[1].view(-1)[70] = float("nan")
    out = engine(x, t, cond)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()
    x, t, cond = inputs(engine, condition)
    cond[0, -1, 3] = float("nan")
    out = engine(x, t, cond)
    assert torch.isnan(out[0]).all()
    assert torch.isfinite(out[1]).all()


def test_which_blocks_are_fused(case, engine):
    plain = [name for name, block in engine.blocks.items() if not fused(block)]
    assert plain == (["2"] if case == "mixed" else [])


def test_gradients_take_the_readable_form(paths):
    engine = load(paths[1], compute="a8")
    x, t, cond = inputs(engine)
    x.requires_grad_()
    assert torch.equal(engine(x, t, cond), readable(FlowTransformer, engine, x, t, cond))


def test_refusals(engine):
    args = inputs(engine)
    engine(*args)
    plan = engine.scratch.plan
    assert isinstance(plan, FlowPlan)
    with pytest.raises(ValueError, match="found \\(2, 130, 72\\)"):
        plan.block(None, None, None, args[2][:, 1:])
