"""Where a network's tokens enter and leave its plan: linears that are kept in float."""

import pytest
import torch
import torch.nn.functional as F

from vitapack.kernels.linear.cpu_plans import Dense, DitPlan

HIDDEN = 72


def plan_of(tokens, inputs, batch=2, threads=2):
    return DitPlan(batch, tokens, HIDDEN, 2, 96, threads, inputs)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (7, 13), (401, 200), (2000, 600)])
def test_tokens_enter(isa, dtype, rows, inputs):
    plan = plan_of(rows + 5, inputs)
    weight, bias = numbers(HIDDEN, inputs).to(dtype), numbers(HIDDEN, seed=1)
    x = numbers(2, rows, inputs, seed=2).to(dtype)
    before = plan.tokens.fill_(3.0).clone()
    plan.enter(Dense(weight, bias), x, 5)
    exact = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x.float(), weight.float(), bias)
    assert error(plan.tokens[:, 5:], exact) <= 2 * error(plain, exact) + 1e-7
    assert torch.equal(plan.tokens[:, :5], before[:, :5])
    plan.enter(Dense(weight), x, 0)
    assert error(plan.tokens[:, :rows], exact - bias.double()) <= 2 * error(plain, exact) + 1e-7


def test_rows_may_lie_apart_and_serve_all_of_a_batch(isa):
    plan, wide = plan_of(40, 30), numbers(60, 3, 40)
    linear = Dense(numbers(HIDDEN, 30, seed=1), numbers(HIDDEN, seed=2))
    for x in (wide.transpose(0, 1)[:2, 10:50, 5:35], numbers(1, 40, 30, seed=3),
              numbers(2, 30, 40, seed=4).mT, numbers(2, 40, 30, seed=5).double()):  # fmt: skip
        plan.enter(linear, x)
        found = plan.tokens.clone()
        plan.enter(linear, x.float().expand(2, -1, -1).contiguous())
        assert torch.equal(found, plan.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("first", "tokens", "outputs"), [(0, 1, 1), (3, 10, 8), (60, 461, 70)])
@pytest.mark.parametrize("rows", [1, 2])  # of shift and scale
def test_tokens_leave(isa, dtype, first, tokens, outputs, rows):
    plan = plan_of(tokens, 8)
    z = plan.tokens.copy_(numbers(2, tokens, HIDDEN) + 1.5)
    weight, bias = numbers(outputs, HIDDEN, seed=1).to(dtype), numbers(outputs, seed=2)
    shift, scale = numbers(rows, 2 * HIDDEN, seed=3).chunk(2, dim=-1)
    out = torch.empty(2, tokens - first, outputs, dtype=dtype)
    plan.leave(Dense(weight, bias), shift, scale, 1e-5, out)

    def plainly(kind):
        normed = F.layer_norm(z[:, first:].to(kind), (HIDDEN,), eps=1e-5)
        modulated = normed * (1 + scale[:, None].to(kind)) + shift[:, None].to(kind)
        return F.linear(modulated, weight.to(kind), bias.to(kind))

    exact = plainly(torch.float64)
    plain = plainly(torch.float32).to(dtype)
    assert error(out, exact) <= 2 * error(plain, exact) + 3e-7  # an ulp of few values


def test_a_nan_stays_in_its_token(isa):
    plan, x = plan_of(9, 20), numbers(2, 9, 20)
    x[1, 3, 7] = float("nan")
    plan.enter(Dense(numbers(HIDDEN, 20)), x)
    out = torch.empty(2, 9, 4)
    plan.leave(Dense(numbers(4, HIDDEN)), *torch.zeros(2, 1, HIDDEN), 1e-6, out)
    wrong = torch.isnan(out).any(dim=-1)
    assert wrong[1, 3]
    assert wrong.sum() == 1


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda p: p.enter(Dense(numbers(HIDDEN, 8)), numbers(2, 9, 8), 2), "9 tokens from 2 on"),
        (lambda p: p.enter(Dense(numbers(8, 8)), numbers(2, 9, 8)), "to 72 channels"),
        (lambda p: p.enter(Dense(numbers(HIDDEN, 9)), numbers(2, 9, 9)), "8 or less"),
        (lambda p: p.enter(Dense(numbers(HIDDEN, 8)), numbers(3, 9, 8)), "1 or 2"),
        (lambda p: p.enter(Dense(numbers(HIDDEN, 7)), numbers(2, 9, 8)), "weight of 8 inputs"),
        (lambda p: p.enter(Dense(numbers(8, HIDDEN).t()), numbers(2, 9, 8)), "contiguous float"),
        (lambda p: p.enter(Dense(numbers(HIDDEN, 8), numbers(8)), numbers(2, 9, 8)), "bias"),
        (lambda p: leave(p, shift=numbers(3, HIDDEN)), "expected float32 \\(1 or 2, 72\\)"),
        (lambda p: leave(p, shift=numbers(2, HIDDEN)), "same strides and contiguous rows"),
        (lambda p: leave(p, out=torch.empty(2, 11, 4)), "output \\(2, 10, 4\\)"),
        (lambda p: leave(p, out=torch.empty(2, 4, 9).mT), "contiguous float output"),
    ],
)
def test_refusals(call, complaint):
    plan = plan_of(10, 8)
    with pytest.raises(ValueError, match=complaint):
        call(plan)


def leave(plan, shift=None, out=None):
    none = torch.zeros(1, HIDDEN)
    out = torch.empty(2, 9, 4) if out is None else out
    plan.leave(Dense(numbers(4, HIDDEN)), none if shift is None else shift, none, 1e-6, out)
