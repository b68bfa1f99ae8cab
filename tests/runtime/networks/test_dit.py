"""The canonical DiT against the reference class, read through the real loading path."""

from dataclasses import replace

import pytest
import torch

from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.dit import DiT
from vitapack.runtime.pipeline.load import load_dit

NAMES = ["hunyuan3ddit_tiny", "hunyuan3ddit_tiny_guidance"]


@pytest.mark.parametrize("name", NAMES)
def test_reference_output(name, golden, released, relative, tmp_path):
    reference = golden(name)
    dit = load_dit(released(dit=name).save(tmp_path / "model"))
    with torch.no_grad():
        assert relative(dit(**reference.inputs), reference.output) <= 1e-5


def test_one_time_serves_the_whole_batch(golden, released, tmp_path):
    reference = golden(NAMES[0])
    dit = load_dit(released().save(tmp_path / "model"))
    x, cond = reference.inputs["x"], reference.inputs["cond"]
    with torch.no_grad():
        one = dit(x, torch.tensor([0.3]), cond)
        many = dit(x, torch.tensor([0.3, 0.3]), cond)
    assert torch.allclose(one, many, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("repeats", [1, 2, 1370])
def test_one_token_stands_for_equal_ones(repeats, dtype, golden, released, relative, tmp_path):
    x = golden(NAMES[0]).inputs["x"]
    folder = released().save(tmp_path / "model")
    dit, t = load_dit(folder), torch.tensor([0.3])
    few = torch.randn(len(x), 2, dit.config.cond_channels) * torch.tensor([[[0.0], [1.0]]])
    many = few.repeat_interleave(repeats, dim=1)
    with torch.no_grad():
        exact = dit(x, t, many)
        if dtype == torch.float32:
            assert relative(dit(x, t, Condition(few, repeats)), exact) <= 1e-6
            return
        narrow, given = load_dit(folder, dtype=dtype), x.to(dtype)
        ours = narrow(given, t, Condition(few.to(dtype), repeats))
        plain = narrow(given, t, many.to(dtype))
    assert relative(ours.float(), exact) <= 2 * relative(plain.float(), exact)


def test_gradients_pass_equal_tokens(golden, released, tmp_path):
    x = golden(NAMES[0]).inputs["x"][:1].requires_grad_()
    dit, t = load_dit(released().save(tmp_path / "model")), torch.tensor([0.3])
    one = torch.randn(1, 1, dit.config.cond_channels)
    found = [
        torch.autograd.grad(dit(x, t, Condition(tokens, repeats)).square().sum(), x)[0]
        for tokens, repeats in ((one, 6), (one.expand(1, 6, -1), 1))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("gone", [[("double", 0)], [("single", 1), ("double", 1)], [("single", 2)]])
def test_leaving_blocks_out_is_building_without_them(gone, golden, released, tmp_path):
    inputs = golden(NAMES[0]).inputs
    dit = load_dit(released().save(tmp_path / "model"))
    pruned = dit.without(*gone)
    kept = {
        f"{kind}_blocks": tuple(
            i for i in getattr(dit.config, f"{kind}_blocks") if (kind, i) not in gone
        )
        for kind in ("double", "single")
    }
    built = DiT(replace(dit.config, **kept))
    state = dit.state_dict()
    built.load_state_dict({name: state[name] for name in built.state_dict()})
    with torch.no_grad():
        assert torch.equal(pruned(**inputs), built(**inputs))
        assert not torch.allclose(pruned(**inputs), dit(**inputs))
    assert pruned.config == built.config
    assert len(dit.double_blocks) == 2  # the original is left whole
    assert len(dit.single_blocks) == 3


def test_guidance_must_be_given_where_it_is_embedded(golden, released, tmp_path):
    inputs = golden(NAMES[1]).inputs
    dit = load_dit(released(dit=NAMES[1]).save(tmp_path / "model"))
    with pytest.raises(ValueError, match="pass guidance"):
        dit(inputs["x"], inputs["t"], inputs["cond"])


def test_impossible_hyper_parameters_are_refused(released, tmp_path):
    config = load_dit(released().save(tmp_path / "model")).config
    with pytest.raises(ValueError, match="not a multiple of heads"):
        replace(config, heads=5)
    for blocks in ((1, 0), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="ascending distinct"):
            replace(config, double_blocks=blocks)
