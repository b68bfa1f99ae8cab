"""The fused DiT against the readable one: same packed file, same numbers to int8's rounding."""

import copy
import logging

import pytest
import torch
from alive_tensors import peak
from readable import readable
from tiny_model import PRUNED, tiny_checkpoint, tiny_map

from vitapack.compressor.packing.compress import compress
from vitapack.kernels.linear import cpu, support
from vitapack.kernels.linear.cpu_plans import DitPlan, StreamWeights
from vitapack.kernels.linear.weights import int8_weight
from vitapack.runtime.engines.cpu_dit import CpuDiT, fused
from vitapack.runtime.engines.cpu_linear import CpuLinear
from vitapack.runtime.format.header import read_header
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.pipeline.load import load_dit

CASES = {
    "int8": (tiny_map(8), "table", False),
    "int4": (tiny_map(4), "int8", False),
    "pruned-mixed": (PRUNED, "kept", False),
    "guidance": (tiny_map(8), "both", True),
}


@pytest.fixture(scope="module", params=list(CASES))
def packed(request, tmp_path_factory):
    """A packed file, and a time (and guidance) that its tables hold."""
    layer_map, modulation, guidance = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, _ = tiny_checkpoint(folder / "model", guidance_embed=guidance)
    compress(checkpoint, layer_map, folder / "m.safetensors", modulation=modulation)
    value = read_header(folder / "m.safetensors").modulation["guidance"]
    return folder / "m.safetensors", torch.full((2,), value) if guidance else None


def inputs(latents=7, condition=5, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, latents, 4, generator=rng)
    return x, torch.zeros(batch), torch.randn(batch, condition, 6, generator=rng)


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


def test_fused_is_as_near_as_the_readable_form(isa, packed):
    path, guidance = packed
    engine, exact = load_dit(path, compute="a8"), load_dit(path)
    assert isinstance(engine, CpuDiT)
    for latents, condition in ((7, 5), (1, 1), (150, 131), (7, 5)):
        args = (*inputs(latents, condition), guidance)
        reference = exact(*args)
        readable_form = readable(DiT, engine, *args)
        ours = engine(*args)
        assert ours.dtype == reference.dtype
        # The readable form quantizes activations, but not attention.
        assert error(ours, reference) <= 2 * error(readable_form, reference) + 2e-3


def test_one_token_stands_for_equal_ones(isa, packed):
    path, guidance = packed
    engine, exact = load_dit(path, compute="a8"), load_dit(path)
    x, t, cond = inputs(70, 1)
    many = cond.expand(-1, 333, -1)
    reference, plain = exact(x, t, many, guidance), engine(x, t, many, guidance)
    found = engine(x, t, Condition(cond, 333), guidance)
    assert error(found, reference) <= 1.5 * error(plain, reference) + 1e-3
    assert error(engine(x, t, cond, guidance), reference) > 10 * error(found, reference)
    torch.testing.assert_close(engine(x, t, many, guidance), plain)  # and it is not left behind


@pytest.mark.parametrize("hidden", [128, 40])  # two heads of a whole panel, and of less
def test_the_last_block_computes_only_what_is_read(isa, hidden):
    rng = torch.Generator().manual_seed(hidden)
    mlp, tokens = 2 * hidden, 211

    def panels(n, k):
        codes = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
        return cpu.pack(int8_weight(codes, torch.full((n,), 1e-3)))

    norm = torch.ones(hidden // 2)
    weights = StreamWeights(panels(3 * hidden + mlp, hidden), norm, norm)
    linear2 = panels(hidden, hidden + mlp)
    modulation = torch.randn(2, 3 * hidden, generator=rng)
    z = torch.randn(2, tokens, hidden, generator=rng)
    whole, part = (DitPlan(2, tokens, hidden, 2, mlp, threads, 0) for threads in (1, 2))
    whole.tokens.copy_(z)
    whole.single_block(weights, linear2, modulation)
    assert not torch.equal(whole.tokens, z)
    for first in (1, 100, 210, 211):
        part.tokens.copy_(z)
        part.single_block(weights, linear2, modulation, first)
        assert torch.equal(part.tokens[:, first:], whole.tokens[:, first:])
        assert torch.equal(part.tokens[:, :first], z[:, :first])
    with pytest.raises(ValueError, match="first token"):
        part.single_block(weights, linear2, modulation, 212)


def test_a_batch_is_its_entries(packed, monkeypatch):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    x, t, cond = inputs(20, 9, batch=3)
    # One time embedding for all: torch's differs in the last bit between 1 and 3 rows, and then so
    # do some roundings to int8.
    when = engine.step_modulation(t[:1], None if guidance is None else guidance[:1])
    monkeypatch.setattr(engine, "step_modulation", lambda t, guidance: when)
    whole = engine(x, t, cond)
    for i in range(3):
        alone = engine(x[i : i + 1], t, cond[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-5, atol=1e-5)
    rows = [None if part is None else part.expand(3, *part.shape[1:]).contiguous()
            for part in (when.vector, when.rows)]  # fmt: skip
    monkeypatch.setattr(engine, "step_modulation", lambda t, guidance: StepModulation(*rows))
    # A modulation that is kept (no table) is a product of torch's too, now of 3 rows.
    assert error(engine(x, t, cond), whole) < 0.02


@pytest.mark.parametrize("dim", [64, 20])  # 64: four tokens are quantized together
def test_rows_do_not_depend_on_their_block(isa, dim):
    rng = torch.Generator().manual_seed(dim)
    hidden, mlp, tokens = 2 * dim, 64, 205
    norms = torch.rand(2, dim, generator=rng) + 0.5

    def panels(n, k):
        codes = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
        return cpu.pack(int8_weight(codes, torch.full((n,), 1e-3)))

    weights = StreamWeights(panels(3 * hidden + mlp, hidden), *norms)
    linear2, modulation = panels(hidden, hidden + mlp), torch.randn(1, 3 * hidden, generator=rng)
    z = torch.randn(1, tokens, hidden, generator=rng)
    found = []
    for threads in (1, 2, 5):
        plan = DitPlan(1, tokens, hidden, 2, mlp, threads, 0)
        plan.tokens.copy_(z)
        plan.single_block(weights, linear2, modulation)
        found.append(plan.tokens.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_threads_do_not_change_a_bit(packed, monkeypatch):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    args = (*inputs(90, 40), guidance)
    found = []
    for threads in (1, 2, 5):  # of the engine: torch's own matrix products do change with theirs
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(engine(*args))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_scratch_is_planned_once(packed):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    args = (*inputs(30, 10), guidance)
    engine(*args)
    plan, size = engine.scratch.plan, engine.scratch.nbytes
    assert size > 0
    engine(*args)
    assert engine.scratch.plan is plan
    other = (*inputs(30, 1), guidance)
    engine(*other)  # a guided step's second call
    second, both = engine.scratch.plan, engine.scratch.nbytes
    assert second is not plan
    assert both == plan.nbytes + second.nbytes
    engine(*args)
    assert engine.scratch.plan is plan
    engine(*other)
    assert engine.scratch.plan is second
    engine(*inputs(20, 1), guidance)
    assert engine.scratch.plans[0] is second
    assert len(engine.scratch.plans) == 2
    assert engine.without(("double", 1)).scratch is engine.scratch
    assert copy.deepcopy(engine).scratch is not engine.scratch


def test_a_call_allocates_nothing_that_grows_with_tokens(packed):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    if not all(fused(block) for block in (*engine.double_blocks.values(),
                                          *engine.single_blocks.values())):  # fmt: skip
        pytest.skip("a block with 16-bit linears runs in the readable form")
    held = []
    for latents, condition in ((30, 10), (330, 210)):
        args = (*inputs(latents, condition), guidance)
        engine(*args)  # plans its memory, which is torch's neither then nor later
        given = [part for part in args if part is not None]
        held.append(peak(engine, *given) - sum(part.nbytes for part in given))
    output = 2 * 300 * 4 * 4
    assert held[1] - held[0] <= output


def test_weights_are_held_once_and_come_back(packed):
    path, guidance = packed
    engine, exact = load_dit(path, compute="a8"), load_dit(path)
    assert engine.state_dict().keys() == exact.state_dict().keys()
    stored = exact.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in engine.state_dict().items())
    names = {name.rpartition(".")[2] for name, _ in engine.named_buffers()}
    assert not names & {"q8", "q4", "group", "scale"}
    assert sum(isinstance(module, CpuLinear) for module in engine.modules()) > 0
    args = (*inputs(), guidance)
    before = engine(*args)
    assert torch.equal(copy.deepcopy(engine)(*args), before)
    assert torch.equal(engine.float()(*args), before)


def test_a_pruned_copy_runs_fused(packed):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    args = (*inputs(), guidance)
    less = engine.without(("single", 0))
    assert error(less(*args), engine(*args)) > 0.01
    assert error(less(*args), readable(DiT, less, *args)) < 0.05


def test_gradients_take_the_readable_form(packed):
    path, guidance = packed
    engine = load_dit(path, compute="a16")
    x, t, cond = inputs()
    x.requires_grad_()
    engine(x, t, cond, guidance).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_nan_stays_visible(packed):
    path, guidance = packed
    engine = load_dit(path, compute="a8")
    x, t, cond = inputs()
    x[1, 3, 0] = float("nan")
    out = engine(x, t, cond, guidance)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


def test_which_blocks_are_fused(packed):
    path, _ = packed
    engine = load_dit(path, compute="a8")
    blocks = [*engine.double_blocks.items(), *engine.single_blocks.items()]
    sixteen = [name for name, block in blocks if not fused(block)]
    assert sixteen == (["2"] if "pruned" in str(path) else [])


def test_the_engine_says_so_once(packed, caplog):
    path, guidance = packed
    support.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="vitapack.kernels"):
        engine = load_dit(path, compute="a8")
        engine(*inputs(), guidance)
        engine(*inputs(), guidance)
    lines = [m for m in caplog.messages if m.startswith("int8 a8 DiT")]
    assert len(lines) == 1
    assert f"int8 engine, {cpu.instruction_set()}" in lines[0]


def test_without_the_compiled_part_the_reference_warns(packed, caplog, monkeypatch):
    path, guidance = packed
    fast = load_dit(path, compute="a8")
    args = (*inputs(), guidance)
    expected = readable(DiT, fast, *args)
    monkeypatch.setattr(cpu, "available", lambda: False)
    support.announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="vitapack.kernels"):
        slow = load_dit(path, compute="a8")
        found = slow(*args)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert any("not built" in m for m in caplog.messages)
    support.announce.cache_clear()
