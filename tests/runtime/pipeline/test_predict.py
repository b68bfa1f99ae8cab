"""Predicted activations against the tensors that are really alive in running networks."""

import json
import subprocess
import sys

import pytest
import torch
from alive_tensors import peak
from torch import nn

from vitapack.kernels.linear.weights import int8_weight
from vitapack.runtime.condition.dinov2 import Dinov2Config, _network
from vitapack.runtime.decode.grid import refine_bytes
from vitapack.runtime.decode.mesh import surface_bytes
from vitapack.runtime.decode.occupancy import OccupancyConfig, OccupancyDecoder
from vitapack.runtime.decode.shape_vae import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.engines.cpu_dit import CpuDiT
from vitapack.runtime.engines.cpu_flow import CpuFlow
from vitapack.runtime.engines.gpu_dit import GpuDiT
from vitapack.runtime.format.architecture import DiTConfig, FlowConfig
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.dit import DiT, hunyuan_time
from vitapack.runtime.networks.flow import FlowTransformer, trellis_time
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import CallShape
from vitapack.runtime.pipeline.predict import (
    IMPORTED,
    LIBRARIES,
    MESHING,
    imported_bytes,
    late_imported_bytes,
)


@pytest.mark.parametrize("swiglu", [True, False])
def test_image_encoder(swiglu):
    config = Dinov2Config(128, 2, 2, 14, 10, 4, 4, swiglu=swiglu)
    measured = peak(_network(config).eval(), torch.randn(1, 3, 140, 140))
    assert measured == pytest.approx(config.working_bytes(140, torch.float32), rel=0.2)


@pytest.mark.parametrize(
    ("doubles", "singles", "latents", "tokens"),
    [(2, 2, 100, 60), (2, 0, 150, 20), (2, 0, 30, 150), (0, 2, 80, 80)],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_double_and_single_blocks(doubles, singles, latents, tokens, batch):
    config = DiTConfig(
        in_channels=64, cond_channels=96, hidden=128, heads=2, double_blocks=tuple(range(doubles)),
        single_blocks=tuple(range(singles)), mlp_ratio=4.0, qkv_bias=True, guidance_embed=False,
        time=hunyuan_time(128),
    )  # fmt: skip
    given = torch.randn(batch, latents, 64), torch.rand(batch), torch.randn(batch, tokens, 96)
    measured = peak(DiT(config).eval(), *given)
    predicted = DiT.step_bytes(config, CallShape((latents, 64), tokens, batch, torch.float32))
    assert measured == pytest.approx(predicted, rel=0.15)


def test_the_engine_s_plans():
    cpu = pytest.importorskip("vitapack.kernels.linear.cpu")
    from vitapack.kernels.linear.cpu_plans import DitPlan, FlowPlan

    if not cpu.available():
        pytest.skip("vitapack._C is not built")
    config = DiTConfig(
        in_channels=64,
        cond_channels=96,
        hidden=256,
        heads=4,
        double_blocks=(0,),
        single_blocks=(0,),
        mlp_ratio=4.0,
        qkv_bias=True,
        guidance_embed=False,
        time=hunyuan_time(256),
    )
    plan = DitPlan(2, 900, 256, 4, 1024, torch.get_num_threads(), 96)
    given = 2 * (2 * 700 * 64 + 200 * 96) * 4
    predicted = CpuDiT.step_bytes(config, CallShape((700, 64), 200, 2, torch.float32))
    assert plan.nbytes + given == pytest.approx(predicted, rel=0.15)
    flow = FlowConfig(
        resolution=10,
        in_channels=8,
        patch=1,
        cond_channels=96,
        hidden=256,
        heads=4,
        blocks=(0,),
        mlp_ratio=4.0,
        time=trellis_time(256),
    )
    plan = FlowPlan(2, 1000, 256, 4, 1024, torch.get_num_threads(), 8, 96)
    plan.expect(300)
    given = 2 * (2 * 1000 * 8 + 300 * 96) * 4
    predicted = CpuFlow.step_bytes(flow, CallShape((8, 10, 10, 10), 300, 2, torch.float32))
    assert plan.nbytes + given == pytest.approx(predicted, rel=0.1)


def test_flow_transformer():
    config = FlowConfig(
        resolution=8,
        in_channels=8,
        patch=1,
        cond_channels=96,
        hidden=128,
        heads=2,
        blocks=(0, 1),
        mlp_ratio=4.0,
        time=trellis_time(128),
    )
    given = torch.randn(1, 8, 8, 8, 8), torch.rand(1), torch.randn(1, 40, 96)
    measured = peak(FlowTransformer(config).eval(), *given)
    predicted = FlowTransformer.step_bytes(config, CallShape((8, 8, 8, 8), 40, 1, torch.float32))
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

    predicted = config.working_bytes(chunk, torch.float32)
    assert peak(ask) == pytest.approx(predicted, rel=0.25)


def test_occupancy_decoder():
    config = OccupancyConfig(4, (32, 16, 8), 2, 2, resolution=4)
    measured = peak(OccupancyDecoder(config).eval(), torch.randn(1, 4, 4, 4, 4))
    assert measured == pytest.approx(config.working_bytes(torch.float32), rel=0.15)


def test_the_grid_grows_with_its_nodes():
    assert refine_bytes(384) == pytest.approx(670e6, rel=0.03)  # measured, docs/published.md
    assert surface_bytes(192) < surface_bytes(384) < refine_bytes(384)


@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize(("latents", "tokens"), [(3072, 1370), (512, 1370), (3072, 1)])
def test_the_gpu_s_form(latents, tokens, compute):
    """At Hunyuan3D-2mini's sizes, on the meta device; what GEMMs allocate inside is counted in
    tests/kernels/interpreted_cases.py."""
    config = DiTConfig(
        in_channels=64, cond_channels=1536, hidden=1024, heads=16, double_blocks=(0,),
        single_blocks=(0,), mlp_ratio=4.0, qkv_bias=True, guidance_embed=False,
        time=hunyuan_time(1024),
    )  # fmt: skip
    with torch.device("meta"):
        network = packed(GpuDiT(config).half(), compute)
        given = torch.empty(1, latents, 64).half(), torch.empty(1, tokens, 1536).half()
        step = StepModulation(vector=torch.empty(1, 1024).half())
    measured = peak(lambda x, cond: network.velocity(x, step, Condition(cond)), *given)
    call = CallShape((latents, 64), tokens, 1, torch.float16, compute, packed=True)
    predicted = GpuDiT.step_bytes(config, call)
    assert measured == pytest.approx(predicted, rel=0.1)


def packed(network, compute):
    """Its blocks' linears as packed ones of 8 bits."""
    for name, linear in list(network.named_modules()):
        if isinstance(linear, nn.Linear) and "_blocks." in name and not name.endswith(".lin"):
            owner, _, leaf = name.rpartition(".")
            codes = torch.empty(linear.weight.shape, dtype=torch.int8)
            scale = torch.empty(linear.out_features)
            layer = PackedLinear(int8_weight(codes, scale), linear.bias.detach(), compute)
            setattr(network.get_submodule(owner), leaf, layer)
    return network


BUNDLED = """
import json, sys
from PIL import Image
from vitapack.runtime.families.furniture import held_out
from vitapack.runtime.pipeline.pipeline import Pipeline

pipeline = Pipeline.open("furniture", device="cpu", memory=sys.argv[1])
assert not {"torch._dynamo", "transformers", "scipy"} & sys.modules.keys()
rows = []
for sample in list(held_out())[:2]:
    pipeline(Image.open(sample.image_path), steps=2)
    rows.append(pipeline.bytes)
print(json.dumps(rows))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of the process are read from /proc")
@pytest.mark.parametrize("memory", ["lean", "resident"])
def test_the_bundled_model_in_a_fresh_process(memory):
    """First and second image: the first imports what meshes need in its last phase."""
    out = subprocess.run(
        [sys.executable, "-c", BUNDLED, memory], capture_output=True, text=True, check=True
    )
    for row in json.loads(out.stdout):
        for phase, found in row.items():
            assert found["predicted"] == pytest.approx(found["peak"], rel=0.2), phase


def test_packages_that_surfaces_need_are_counted_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert imported_bytes(["transformers"]) == IMPORTED["transformers"]
    assert late_imported_bytes(["transformers"]) == 0  # it imports scipy itself
    assert late_imported_bytes([]) == MESHING < LIBRARIES
    monkeypatch.setitem(sys.modules, "scipy", sys)
    monkeypatch.setitem(sys.modules, "transformers", sys)
    assert imported_bytes(["transformers"]) == late_imported_bytes([]) == 0
