"""Predicted activations against the tensors that are really alive in running networks."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitapack.runtime.activations import (
    encoder_bytes,
    occupancy_bytes,
    refine_bytes,
    step_bytes,
    surface_bytes,
    volume_bytes,
)
from vitapack.runtime.dinov2 import Dinov2Config, _network
from vitapack.runtime.dit import DiT, DiTConfig, hunyuan_time
from vitapack.runtime.shape_decoder import ShapeDecoder, ShapeDecoderConfig
from vitapack.runtime.trellis import (
    FlowConfig,
    FlowTransformer,
    OccupancyConfig,
    OccupancyDecoder,
    trellis_time,
)


class Alive(TorchDispatchMode):
    """The peak of bytes in storages that were made inside and are still held."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, count = storage._cdata, storage.nbytes()
                if key not in given and key not in self.known:
                    self.known.add(key)
                    self.now += count
                    weakref.finalize(storage, self.gone, key, count)
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, count):
        self.known.discard(key)
        self.now -= count


def peak(call, *given):
    with torch.inference_mode(), Alive() as alive:
        call(*given)
    return alive.peak + sum(tensor.nbytes for tensor in given)


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


def test_the_engine_s_plan():
    cpu = pytest.importorskip("vitapack.kernels.cpu")
    if not cpu.available():
        pytest.skip("vitapack._C is not built")
    config = DiTConfig(64, 96, 256, 4, (0,), (0,), 4.0, True, False, hunyuan_time(256))
    plan = cpu.Plan(2, 900, 256, 4, 1024, torch.get_num_threads())
    given = 2 * (2 * 700 * 64 + 200 * 96) * 4
    predicted = step_bytes(config, (700, 64), 200, 2, torch.float32, engine=True)
    assert plan.nbytes + given == pytest.approx(predicted, rel=0.15)


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
    assert refine_bytes(384) == pytest.approx(862e6, rel=0.03)  # measured, docs/published.md
    assert surface_bytes(192) < surface_bytes(384) < refine_bytes(384)
