"""Predicted activations against the tensors that are really alive in running networks."""

import pytest
import torch
from alive_tensors import peak
from torch import nn

from vitapack.runtime.condition.dinov2 import Dinov2Config, _network
from vitapack.runtime.condition.predict import encoder_bytes
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.decode.predict import (
    occupancy_bytes,
    refine_bytes,
    surface_bytes,
    volume_bytes,
)
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.engines.gpu_dit import GpuDiT
from vitapack.runtime.engines.predict import step_bytes
from vitapack.runtime.networks.dit import DiT, DiTConfig, hunyuan_time
from vitapack.runtime.networks.flow import FlowConfig, FlowTransformer, trellis_time
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import When


@pytest.mark.parametrize("swiglu", [True, False])
def test_image_encoder(swiglu):
    config = Dinov2Config(128, 2, 2, 14, 10, 4, 4, swiglu=swiglu)
    measured = peak(_network(config).eval(), torch.randn(1, 3, 140, 140))
    assert measured == pytest.approx(encoder_bytes(config, 140, torch.float32), rel=0.2)


@pytest.mark.parametrize(
    ("doubles", "singles", "latents", "tokens"),
    [(2, 2, 100, 60), (2, 0, 150, 20), (2, 0, 30, 150), (0, 2, 80, 80)],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_double_and_single_blocks(doubles, singles, latents, tokens, batch):
    config = DiTConfig(
        64, 96, 128, 2, tuple(range(doubles)), tuple(range(singles)), 4.0, True, False,
        hunyuan_time(128),
    )  # fmt: skip
    given = torch.randn(batch, latents, 64), torch.rand(batch), torch.randn(batch, tokens, 96)
    measured = peak(DiT(config).eval(), *given)
    predicted = step_bytes(config, (latents, 64), tokens, batch, torch.float32)
    assert measured == pytest.approx(predicted, rel=0.15)


def test_the_engine_s_plans():
    cpu = pytest.importorskip("vitapack.kernels.linear.cpu")
    from vitapack.kernels.linear.cpu_plans import DitPlan, FlowPlan

    if not cpu.available():
        pytest.skip("vitapack._C is not built")
    config = DiTConfig(64, 96, 256, 4, (0,), (0,), 4.0, True, False, hunyuan_time(256))
    plan = DitPlan(2, 900, 256, 4, 1024, torch.get_num_threads(), 96)
    given = 2 * (2 * 700 * 64 + 200 * 96) * 4
    predicted = step_bytes(config, (700, 64), 200, 2, torch.float32, engine=True)
    assert plan.nbytes + given == pytest.approx(predicted, rel=0.15)
    flow = FlowConfig(10, 8, 1, 96, 256, 4, (0,), 4.0, trellis_time(256))
    plan = FlowPlan(2, 1000, 256, 4, 1024, torch.get_num_threads(), 8, 96)
    plan.expect(300)
    given = 2 * (2 * 1000 * 8 + 300 * 96) * 4
    predicted = step_bytes(flow, (8, 10, 10, 10), 300, 2, torch.float32, engine=True)
    assert plan.nbytes + given == pytest.approx(predicted, rel=0.1)


def test_flow_transformer():
    config = FlowConfig(8, 8, 1, 96, 128, 2, (0, 1), 4.0, trellis_time(128))
    given = torch.randn(1, 8, 8, 8, 8), torch.rand(1), torch.randn(1, 40, 96)
    measured = peak(FlowTransformer(config).eval(), *given)
    predicted = step_bytes(config, (8, 8, 8, 8), 40, 1, torch.float32)
    assert measured == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize(("latents", "chunk"), [(40, 500), (400, 100)])
@pytest.mark.parametrize("turbo", [False, True])
def test_shape_decoder(latents, chunk, turbo):
    config = ShapeDecoderConfig(
        latents, 16, 64, 2, 2, 8, False, False, True, 1.0, geo_downsample=2 if turbo else 1,
        geo_mlp_expand=1 if turbo else 4, geo_ln_post=not turbo,
    )  # fmt: skip
    network = ShapeDecoder(config).eval()
    latent, points = torch.randn(1, latents, 16), torch.rand(chunk, 3)

    def ask():
        network.field(latent)(points)

    predicted = volume_bytes(config, chunk, torch.float32)
    assert peak(ask) == pytest.approx(predicted, rel=0.25)


def test_occupancy_decoder():
    config = OccupancyConfig(4, (32, 16, 8), 2, 2, resolution=4)
    measured = peak(OccupancyDecoder(config).eval(), torch.randn(1, 4, 4, 4, 4))
    assert measured == pytest.approx(occupancy_bytes(config, torch.float32), rel=0.15)


def test_the_grid_grows_with_its_nodes():
    assert refine_bytes(384) == pytest.approx(670e6, rel=0.03)  # measured, docs/published.md
    assert surface_bytes(192) < surface_bytes(384) < refine_bytes(384)


@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize(("latents", "tokens"), [(3072, 1370), (512, 1370), (3072, 1)])
def test_the_gpu_s_form(latents, tokens, compute):
    """At Hunyuan3D-2mini's sizes, on the meta device; what GEMMs allocate inside is counted in
    tests/kernels/interpreted_cases.py."""
    config = DiTConfig(
        64, 1536, 1024, 16, (0,), (0,), 4.0, True, False, hunyuan_time(1024)
    )  # fmt: skip
    with torch.device("meta"):
        network = packed(GpuDiT(config).half(), compute)
        given = torch.empty(1, latents, 64).half(), torch.empty(1, tokens, 1536).half()
        when = When(vector=torch.empty(1, 1024).half())
    measured = peak(lambda x, cond: network.velocity(x, when, cond), *given)
    predicted = step_bytes(config, (latents, 64), tokens, 1, torch.float16, fused=compute)
    assert measured == pytest.approx(predicted, rel=0.1)


def packed(network, compute):
    """Its blocks' linears as packed ones of 8 bits."""
    for name, linear in list(network.named_modules()):
        if isinstance(linear, nn.Linear) and "_blocks." in name and not name.endswith(".lin"):
            owner, _, leaf = name.rpartition(".")
            codes = torch.empty(linear.weight.shape, dtype=torch.int8)
            scale = torch.empty(linear.out_features)
            layer = PackedLinear(
                linear.in_features, scale, linear.bias.detach(), q8=codes, compute=compute
            )
            setattr(network.get_submodule(owner), leaf, layer)
    return network
