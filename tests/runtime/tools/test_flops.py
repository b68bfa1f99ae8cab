"""Operations counted from the graph, against the closed form that the published models follow."""

import pytest

from vitapack.runtime.families import hunyuan3d, step1x3d, trellis
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.tools.flops import guided_flops, run_flops, step_flops


def closed_form(layers, hidden, tokens, batch=2):
    """12 h^2 multiply-adds a token and block, and 2 n h for attention."""
    return batch * layers * (2 * 12 * hidden**2 * tokens + 4 * tokens**2 * hidden)


MINI = {"depth": 8, "depth_single_blocks": 16}


@pytest.mark.parametrize(
    ("config", "latents", "cond", "layers"),
    [
        (hunyuan3d.dit_config({}, "x"), (3072, 64), 1370, 48),
        (hunyuan3d.dit_config(MINI, "x"), (512, 64), 1370, 24),
        (step1x3d.dit_config({}, "x", []), (2048, 64), 1370, 36),
    ],
)
def test_published_models(config, latents, cond, layers):
    found = step_flops(config, latents, cond, batch=2)
    tokens = latents[0] + cond
    assert found.total == pytest.approx(closed_form(layers, config.hidden, tokens), rel=5e-3)
    assert found.attention == pytest.approx(8 * layers * tokens**2 * config.hidden, rel=1e-3)


def test_the_paper_s_figures():
    """TFLOP a step: its Step1X-3D leaves attention out, the others do not."""
    for config, latents, cond, batch, paper in (
        (hunyuan3d.dit_config({}, "x"), (3072, 64), 1370, 2, 18.502),
        (hunyuan3d.dit_config(MINI, "x"), (512, 64), 1370, 2, 2.980),
        (trellis.flow_config({}, "x", [], slat=False), (8, 16, 16, 16), 1374, 1, 5.23),
    ):
        found = step_flops(config, latents, cond, batch).total / 1e12
        assert found == pytest.approx(paper, rel=1e-3)
    step1x = step_flops(step1x3d.dit_config({}, "x", []), (2048, 64), 1370, 2)
    assert (step1x.total - step1x.attention) / 1e12 == pytest.approx(9.689, rel=1e-3)


def test_a_run_counts_what_is_evaluated():
    config = trellis.flow_config({"num_blocks": 2}, "x", [], slat=False)
    one, short = (step_flops(config, (8, 16, 16, 16), tokens, 1).total for tokens in (1374, 1))
    sampler = SamplerDefaults("euler", 25, 6.0, 3.0, "trellis", guidance_interval=(0.5, 1.0))
    assert run_flops(config, (8, 16, 16, 16), 1374, sampler) == 25 * one + 19 * short
    config = hunyuan3d.dit_config({"depth": 1, "depth_single_blocks": 1}, "x")
    one, short = (step_flops(config, (512, 64), tokens, 1).total for tokens in (1370, 1))
    sampler = SamplerDefaults("euler", 20, 5.0)
    assert run_flops(config, (512, 64), 1370, sampler) == 19 * (one + short)
    assert short == pytest.approx(closed_form(2, 1024, 513, batch=1), rel=0.02)
    step = guided_flops(config, (512, 64), 1370, one_batch=False)
    assert step.total == one + short
    assert guided_flops(config, (512, 64), 1370, one_batch=True).total == 2 * one
    embedded = hunyuan3d.dit_config({"depth": 1, "guidance_embed": True}, "x")
    assert guided_flops(embedded, (512, 64), 1370, one_batch=True) == step_flops(
        embedded, (512, 64), 1370, 1
    )
