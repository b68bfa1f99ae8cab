"""The packed network inside another pipeline.

hy3dgen cannot be installed here: `StandIn` does what its flow-matching pipeline does around the
network (times cast to the model's dtype before they are divided, guidance as one batch, one last
evaluation whose velocity is multiplied by zero), and no more.
"""

import itertools

import pytest
import torch
from tiny_released import tiny_released

from vitapack.compressor.packing.compress import compress
from vitapack.compressor.planning.files import resolve_plan
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.open import open_checkpoint
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.integrations.hy3dgen import attach
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import MissingTime
from vitapack.runtime.pipeline.load import load_dit
from vitapack.runtime.sampling.solvers import classifier_free, sample


class Original(torch.nn.Module):
    def __init__(self, dit):
        super().__init__()
        self.dit, self.latent_in = dit, dit.latent_in
        self.guidance_embed = dit.config.embeds_guidance

    def forward(self, x, t, contexts, guidance=None):
        return self.dit(x, t, contexts["main"], guidance)


class StandIn:
    def __init__(self, model, dtype=torch.float32):
        self.model, self.dtype, self.device = model, dtype, torch.device("cpu")

    def __call__(self, latents, cond, steps, guidance_scale=5.0):
        latents, cond = latents.to(self.dtype), cond.to(self.dtype)
        guided = not self.model.guidance_embed
        if guided:
            cond = torch.cat([cond, torch.zeros_like(cond)])
        embedded = None if guided else torch.tensor([guidance_scale], dtype=self.dtype)
        sigmas = torch.cat([torch.linspace(0, 1, steps), torch.ones(1)])
        for sigma, after in itertools.pairwise(sigmas):
            x = torch.cat([latents] * 2) if guided else latents
            t = (sigma * 1000).expand(len(x)).to(self.dtype) / 1000
            v = self.model(x, t, {"main": cond}, guidance=embedded)
            if guided:
                with_image, without = v.chunk(2)
                v = without + guidance_scale * (with_image - without)
            latents = latents + (after - sigma) * v
        return latents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> the tiny original's folder and its packed file, tables for 5 steps."""
    found = {}

    def make(name):
        if name not in found:
            folder = tiny_released(name, tmp_path_factory.mktemp(name))
            checkpoint = open_checkpoint(folder)
            out = folder / "packed.safetensors"
            plan = resolve_plan("fp16", checkpoint)
            compress(checkpoint, plan, out, samplers=["euler"], steps=[5], embed=False)
            found[name] = folder, out
        return found[name]

    return make


@pytest.mark.parametrize("name", ["hunyuan3d-2mini", "hunyuan3d-2mini-fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_runs_as_our_own_sampler_does(name, dtype, made, relative):
    folder, out = made(name)
    original = load_dit(folder)
    pipeline = StandIn(Original(original), dtype)
    assert attach(pipeline, out) is pipeline
    assert pipeline.model.dtype == dtype
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 24, 64, generator=rng)
    cond = torch.randn(1, 10, 64, generator=rng)
    with torch.no_grad():
        found = pipeline(noise, cond, 5).float()

    def network(x, t, tokens):
        given = torch.tensor([5.0]) if original.config.embeds_guidance else None
        return original(x, torch.tensor([t]), tokens, given)

    scale = 1.0 if original.config.embeds_guidance else 5.0
    velocity = classifier_free(network, cond, torch.zeros_like(cond), scale)
    with torch.no_grad():
        wanted = sample(velocity, noise, SamplerDefaults("euler", 5, scale))
    if dtype == torch.float32:
        assert relative(found, wanted) < 2e-3  # tables in fp16
        return
    plain = StandIn(Original(load_dit(folder, dtype=dtype)), dtype)  # the same without us
    with torch.no_grad():
        theirs = plain(noise, cond, 5).float()
    assert relative(found, wanted) <= 2 * relative(theirs, wanted)


def test_the_unconditional_half_is_one_token(made, monkeypatch):
    folder, out = made("hunyuan3d-2mini")
    pipeline = attach(StandIn(Original(load_dit(folder))), out)
    model, x = pipeline.model, torch.randn(4, 24, 64)
    cond = torch.cat([torch.randn(2, 10, 64), torch.zeros(2, 10, 64)])
    calls = []
    whole = model.dit.forward
    monkeypatch.setattr(
        model.dit,
        "forward",
        lambda *a, **k: calls.append(Condition.of(a[2]).tokens.shape) or whole(*a, **k),
    )
    with torch.no_grad():
        both = model(x, torch.zeros(4), {"main": cond})
        assert calls == [(2, 10, 64), (2, 1, 64)]
        torch.testing.assert_close(both, whole(x, torch.zeros(1), cond), rtol=1e-4, atol=1e-5)
        cond[3, 4] = 1
        model(x, torch.zeros(4), {"main": cond})
    assert calls[2:] == [(4, 10, 64)]


def test_steps_without_tables_are_refused(made):
    folder, out = made("hunyuan3d-2mini")
    pipeline = attach(StandIn(Original(load_dit(folder)), torch.float16), out)
    with pytest.raises(MissingTime, match="this file holds euler 5 steps"), torch.no_grad():
        pipeline(torch.randn(1, 24, 64), torch.randn(1, 10, 64), 4)


def test_pipelines_and_files_of_another_kind(made):
    folder, out = made("hunyuan3d-2mini")
    _, fast = made("hunyuan3d-2mini-fast")
    _, step1x = made("step1x-3d")
    pipeline = StandIn(Original(load_dit(folder)))
    for file in (fast, step1x):
        with pytest.raises(UserError, match="a Hunyuan3D model without embedded guidance"):
            attach(pipeline, file)
    with pytest.raises(UserError, match="has no network called model"):
        attach(object(), out)
    pipeline.model.latent_in = torch.nn.Linear(32, 64)
    with pytest.raises(UserError, match="latents of 64 channels, the pipeline's model 32"):
        attach(pipeline, out)
