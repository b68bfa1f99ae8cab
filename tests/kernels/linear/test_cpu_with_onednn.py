"""The engine and torch's oneDNN on the same threads: both use AMX's tile registers, each in its own
shapes, and both have to give what they give alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from vitapack.kernels.linear import cpu
from vitapack.kernels.linear.cpu_plans import Dense, DitPlan, StreamWeights
from vitapack.kernels.linear.weights import int8_weight

HIDDEN, TOKENS = 128, 70


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def panels(n, k, seed=0):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=rng, dtype=torch.int8)
    return cpu.pack(int8_weight(codes, torch.rand(n, generator=rng) * 0.01))


def engine_calls():
    """Linears, attention and a plan's blocks, which all use the tiles."""
    x, qkv = torch.randn(100, HIDDEN), torch.randn(1, TOKENS, 3, 2, 64)
    small, large = panels(40, HIDDEN), panels(300, HIDDEN)
    attention = cpu.Attention(1, TOKENS, 2, 64)
    norm = torch.ones(64)
    weights = StreamWeights(
        panels(3 * HIDDEN, HIDDEN), norm, norm, panels(HIDDEN, HIDDEN), panels(256, HIDDEN),
        panels(HIDDEN, 256),
    )  # fmt: skip
    plan = DitPlan(1, TOKENS, HIDDEN, 2, 256, torch.get_num_threads(), 16)
    enter, tokens = Dense(torch.randn(HIDDEN, 16)), torch.randn(1, TOKENS, 16)
    modulation = torch.randn(1, 6 * HIDDEN)

    def run_plan():
        plan.enter(enter, tokens)
        plan.double_block([(0, TOKENS, weights, modulation)])
        return plan.tokens.clone()

    return [
        lambda: cpu.linear_a8(x, small),
        lambda: cpu.linear_a8(x[:3], large),
        lambda: cpu.linear_a16(x.bfloat16(), large),
        lambda: attention(qkv),
        run_plan,
    ]


def torch_calls():
    """bf16 products of several shapes: oneDNN chooses a tile configuration for each."""
    inputs = [torch.randn(m, k).bfloat16() for m, k in ((512, 512), (7, 96), (33, 40), (1, 64))]
    weights = [
        torch.randn(n, x.shape[1]).bfloat16() for n, x in zip((512, 48, 9, 64), inputs, strict=True)
    ]
    return [lambda x=x, w=w: F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]


def test_in_turn_on_one_thread(isa):
    ours, theirs = engine_calls(), torch_calls()
    expected = [call() for call in ours], [call() for call in theirs]
    for i, call in enumerate(ours):
        for j, other in enumerate(theirs):
            assert torch.equal(other(), expected[1][j])
            assert torch.equal(call(), expected[0][i])
            assert torch.equal(other(), expected[1][j])


def test_on_several_threads_at_once(isa, two_threads):
    theirs = torch_calls()
    expected = [call() for call in theirs]
    started = threading.Barrier(3)

    def work():
        ours = engine_calls()
        first = [call() for call in ours]
        started.wait(60)
        for turn in range(6):
            for i, call in enumerate(ours):
                j = (turn + i) % len(theirs)
                assert torch.equal(theirs[j](), expected[j])
                assert torch.equal(call(), first[i])

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(work) for _ in range(3)]:
            done.result()


def test_a_block_is_the_same_with_amx_and_avx512():
    """Not promised for other sets: these two have the same vectors."""
    if cpu.instruction_sets()[:2] != ["amx-int8", "avx512-vnni"]:
        pytest.skip("this CPU has no AMX")
    calls = engine_calls()
    try:
        cpu.use_instruction_set("amx-int8")
        found = [call() for call in calls]
        cpu.use_instruction_set("avx512-vnni")
        assert all(torch.equal(a, call()) for a, call in zip(found, calls, strict=True))
    finally:
        cpu.use_instruction_set("")
