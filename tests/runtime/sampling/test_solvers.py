"""Samplers against trajectories of the reference schedulers, and their schedules by themselves."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.schedules import (
    SamplerDefaults,
    evaluation_times,
    guided_times,
    schedule,
    times,
)
from vitapack.runtime.progress import Cancelled, Control, Progress
from vitapack.runtime.sampling.solvers import classifier_free, sample, trajectory

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "schedulers.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def constants():
    with safe_open(GOLDEN, "np") as file:
        return json.loads(file.metadata()["config"])


def entries():
    with safe_open(GOLDEN, "np") as file:
        names = sorted({key.rsplit("/", 1)[0] for key in file.keys() if "trajectory" in key})  # noqa: SIM118
    assert len(names) == 53
    return names


def settings_of(name):
    """The sampler settings that a golden entry's name stands for."""
    kind = name.split("/")[0]
    numbers = dict(re.findall(r"/(n|shift|rescale|pcm|order|zero_init)([\d.]+)", name))
    shift = float(numbers.get("shift") or numbers.get("rescale") or 1)
    made = SamplerDefaults("euler", int(numbers["n"]), 1.0, shift)
    if kind == "hunyuan_consistency":
        return replace(made, name="consistency", pcm_timesteps=int(numbers["pcm"]))
    if kind == "step1x_euler":
        return replace(made, flow="step1x", zero_init=numbers["zero_init"] == "1")
    if kind == "unipc_flow":
        return replace(made, name="unipc", flow="step1x", order=int(numbers["order"]))
    if kind == "trellis":
        return replace(made, flow="trellis", guidance_interval=(0.5, 1.0))
    return made


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def analytic(constants, scale):
    """v = a x + b sin(c t) + gain * cond, t being the model time over `scale`."""
    a, b, c = constants["a"], constants["b"], constants["c"]

    def network(x, t, cond):
        wave = b * torch.sin(c * (torch.tensor(t, dtype=torch.float32) / scale))
        return a * x + wave + constants["cond_gain"] * cond

    return network


@pytest.mark.parametrize("name", entries())
def test_reference_trajectories(golden, constants, name):
    settings = settings_of(name)
    network = analytic(constants, 1.0 if settings.flow == "hunyuan" else 1000.0)
    x0 = golden["inputs/x0"]
    nothing = torch.zeros_like(x0)
    evaluated = []
    if name.startswith("trellis"):
        kind = name.split("/")[1]
        scale = 1 + constants["cfg_strength"] if kind != "plain" else 1.0
        only_at = guided_times(settings) if kind == "cfg_interval" else None
        guided = classifier_free(network, golden["inputs/cond"], nothing, scale, only_at=only_at)
    else:
        guided = classifier_free(network, nothing, nothing, 1.0)

    def velocity(x, t):
        evaluated.append(t)
        return guided(x, t)

    states = torch.stack(list(trajectory(velocity, x0, settings)))
    expected = golden[f"{name}/trajectory"]
    assert states.shape == expected.shape
    for ours, theirs in zip(states, expected, strict=True):
        assert relative(ours, theirs) <= 2e-6
    # The times are known ahead, to the bit, and the network is never asked for a wasted value.
    assert evaluated == evaluation_times(settings)
    plan = schedule(settings)
    if name.startswith("trellis"):
        assert torch.allclose(
            torch.tensor(plan.levels, dtype=torch.float64), golden[f"{name}/t_seq"], atol=1e-15
        )
    else:
        assert torch.allclose(torch.tensor(plan.levels), golden[f"{name}/sigmas"], atol=6e-8)


def test_wasted_evaluations_are_skipped():
    assert len(times("euler", 20)) == 19
    assert times("euler", 20)[-1] == pytest.approx(18 / 19)
    assert len(times("euler", 30, flow="step1x", zero_init=True)) == 29
    assert len(times("euler", 30, flow="step1x")) == 30
    assert len(times("euler", 25, 3.0, flow="trellis")) == 25
    assert len(times("unipc", 20)) == 20
    assert times("euler", 1) == [0.0]
    assert times("consistency", 5) == pytest.approx([0, 0.1992, 0.3994, 0.5996, 0.7998], abs=5e-5)


def test_trellis_guidance_is_on_for_nineteen_of_twenty_five_steps():
    settings = SamplerDefaults("euler", 25, 6.0, 3.0, "trellis", guidance_interval=(0.5, 1.0))
    assert len(guided_times(settings)) == 19


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_the_hunyuan_flow_mirrors_the_sigma_flow(golden, constants, order):
    """sigma = 1 - t and a negated velocity: the same states."""
    network = analytic(constants, 1000.0)
    x0 = golden["inputs/x0"]
    nothing = torch.zeros_like(x0)
    forward = SamplerDefaults("unipc", 10, 1.0, flow="step1x", order=order)
    backward = replace(forward, flow="hunyuan")
    ours = sample(lambda x, t: -network(x, 1000.0 * (1 - t), nothing), x0, backward)
    theirs = sample(lambda x, t: network(x, t, nothing), x0, forward)
    assert relative(ours, theirs) <= 1e-6
    assert backward.steps == len(evaluation_times(backward))


def test_unipc_converges_with_its_order():
    """Halving the step divides the error by about 2^(order + 1): predictor p with corrector."""

    def velocity(x, t):  # towards data = sin(3 sigma) + 1, smooth in sigma
        return x * -0.7 + math.sin(3 * t / 1000)

    noise = torch.ones(1, dtype=torch.float64)
    exact = sample(velocity, noise, SamplerDefaults("unipc", 1000, 1.0, flow="step1x", order=3))
    errors = {
        order: (
            sample(velocity, noise, SamplerDefaults("unipc", 40, 1.0, flow="step1x", order=order))
            - exact
        )
        .abs()
        .item()
        for order in (1, 2, 3)
    }
    euler = sample(velocity, noise, SamplerDefaults("euler", 40, 1.0, flow="step1x")) - exact
    assert errors[2] < errors[1] < euler.abs().item()
    assert errors[3] < errors[1]


def test_model_times_are_float32_values_and_ascend_to_the_data():
    for name in ("euler", "consistency", "unipc"):
        nodes = times(name, 20)
        assert nodes == torch.tensor(nodes, dtype=torch.float32).double().tolist()
        assert nodes == sorted(nodes)
        assert len(set(nodes)) == len(nodes)
    nodes = times("unipc", 20)
    assert nodes[0] == 1 - float(torch.tensor(1 - 1e-6, dtype=torch.float32).double())
    # Spelled out, so that a file made today is readable by tomorrow's schedule.
    assert [t.hex() for t in times("unipc", 3)] == [
        "0x1.1000000000000p-20",
        "0x1.54fdf40000000p-2",
        "0x1.54fdf40000000p-1",
    ]


def test_classifier_free_guidance():
    x, cond = torch.randn(3, 4, 2), torch.randn(1, 4, 2)
    calls = []

    def network(x, t, cond):
        calls.append(len(x))
        return x * t + cond

    one = classifier_free(network, cond, torch.zeros_like(cond), 5.0, one_batch=True)
    two = classifier_free(network, cond, torch.zeros_like(cond), 5.0)
    assert torch.allclose(one(x, 0.5), x * 0.5 + 5 * cond, atol=1e-5)
    assert torch.equal(one(x, 0.5), two(x, 0.5))
    assert calls == [6, 6, 3, 3]
    calls.clear()
    assert torch.equal(
        classifier_free(network, cond, torch.zeros_like(cond), 1.0)(x, 0.5), x * 0.5 + cond
    )
    some = classifier_free(network, cond, torch.zeros_like(cond), 5.0, only_at={0.25})
    assert torch.equal(some(x, 0.5), x * 0.5 + cond)
    assert calls == [3, 3]
    short = classifier_free(network, cond, torch.zeros(1, 1, 2), 5.0)
    assert torch.equal(short(x, 0.5), two(x, 0.5))


def test_progress_counts_evaluations():
    seen, settings = [], SamplerDefaults("euler", 5, 1.0)
    sample(lambda x, t: x, torch.ones(1), settings, Control(seen.append))
    assert seen == [Progress("denoise", done, 4) for done in (1, 2, 3, 4)]


def test_a_sampler_is_cancelled_before_its_next_evaluation():
    called = []

    def velocity(x, t):
        called.append(t)
        if len(called) == 2:
            control.cancel()
        return x

    control = Control()
    with pytest.raises(Cancelled):
        sample(velocity, torch.ones(1), SamplerDefaults("euler", 5, 1.0), control)
    assert len(called) == 2


def test_settings_survive_json():
    made = SamplerDefaults("euler", 25, 6.0, 3.0, "trellis", guidance_interval=(0.5, 1.0))
    assert SamplerDefaults.from_json(json.loads(json.dumps(made.to_json()))) == made
    for broken in ({"name": "euler"}, {**made.to_json(), "colour": "red"}, ["euler"]):
        with pytest.raises(FormatError, match="sampler settings hold"):
            SamplerDefaults.from_json(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "ddim"}, "no sampler 'ddim': choose one of euler, consistency, unipc"),
        ({"flow": "river"}, "no flow 'river'"),
        ({"steps": 0}, "steps 0: expected a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"steps": True}, "steps True"),
        ({"order": 4}, "order 4"),
        ({"shift": 0.0}, "shift 0.0"),
        ({"shift": float("nan")}, "shift nan"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": "high"}, "guidance 'high'"),
        ({"pcm_timesteps": 300}, "pcm_timesteps 300 does not divide 1000"),
        ({"name": "consistency", "steps": 101}, "101 consistency steps"),
        ({"name": "consistency", "flow": "step1x"}, "Hunyuan3D models only"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
    ],
)
def test_bad_settings_are_named_in_one_line(change, message):
    with pytest.raises(UserError) as caught:
        replace(SamplerDefaults("euler", 20, 5.0), **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
