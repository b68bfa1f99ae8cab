"""A new kind of network, added as docs/adding.md says, is packed, loaded, pruned and inspected."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitapack.compressor.packing.compress import compress
from vitapack.runtime.engines import choose
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.format.architecture import (
    ARCHITECTURES,
    Architecture,
    Linear,
    TimeEmbedding,
    architecture_from_json,
)
from vitapack.runtime.format.checks import Check, is_count
from vitapack.runtime.format.describe import describe
from vitapack.runtime.format.header import read_header
from vitapack.runtime.format.layermap import BlockEntry, LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.loading.checkpoint_files import open_weights
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.blocks import layer_norm
from vitapack.runtime.networks.modulation import Modulation, TimeMLP
from vitapack.runtime.networks.network import CallShape, Network


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Architecture):
    """Modulated linears that see the mean of the condition: a kind that does not exist."""

    kind: ClassVar[str] = "pool"
    block_kinds: ClassVar[tuple[str, ...]] = ("block",)
    CHECKS: ClassVar[Mapping[str, Check]] = {"in_channels": (is_count, "a size")}

    blocks: tuple[int, ...]

    def linears(self) -> dict[str, Linear]:
        h = self.hidden
        linears = {
            "latent_in": Linear(h, self.in_channels, True, "edge"),
            "cond_in": Linear(h, self.cond_channels, True, "edge"),
            **self.time.linears("time_in", h),
        }
        for index in self.blocks:
            linears[f"blocks.{index}.mod.lin"] = Linear(3 * h, h, True, "modulation")
            linears[f"blocks.{index}.mix"] = Linear(h, h, True, "block")
        return linears | {"out": Linear(self.in_channels, h, True, "edge")}

    def norms(self) -> dict[str, tuple[int, ...]]:
        return {}


class PoolBlock(nn.Module):
    def __init__(self, config: PoolConfig) -> None:
        super().__init__()
        self.mod = Modulation(config.hidden, 1)
        self.mix = nn.Linear(config.hidden, config.hidden)

    def forward(self, x, pooled, step):
        (mod,) = self.mod(step)
        return x + mod.gate * self.mix((1 + mod.scale) * layer_norm(x + pooled) + mod.shift)


class PoolNetwork(Network):
    def __init__(self, config: PoolConfig) -> None:
        super().__init__(config)
        self.latent_in = nn.Linear(config.in_channels, config.hidden)
        self.cond_in = nn.Linear(config.cond_channels, config.hidden)
        self.time_in = TimeMLP(config.time, config.hidden)
        self.blocks = nn.ModuleDict({str(index): PoolBlock(config) for index in config.blocks})
        self.out = nn.Linear(config.hidden, config.in_channels)

    def evaluate(self, x, step, condition):
        pooled = self.cond_in(condition.tokens).mean(1, keepdim=True)
        x = self.latent_in(x)
        for block in self.blocks.values():
            x = block(x, pooled, step)
        return self.out(x)

    @classmethod
    def step_bytes(cls, config: PoolConfig, call: CallShape) -> int:
        return 4 * call.batch * call.latents[0] * config.hidden * call.dtype.itemsize


CONFIG = PoolConfig(
    in_channels=4, cond_channels=6, hidden=32, heads=1, mlp_ratio=1.0, blocks=(0, 1, 2),
    time=TimeEmbedding(8, 32, 1000.0, 1000.0, cos_first=True, activation="silu"),
)  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    """The two entries of docs/adding.md."""
    monkeypatch.setitem(ARCHITECTURES, PoolConfig.kind, PoolConfig)
    monkeypatch.setitem(choose.READABLE, PoolConfig, PoolNetwork)


@pytest.fixture
def original(tmp_path, known):
    network = choose.network_of(CONFIG).eval().requires_grad_(False)
    tensors = {f"model.{name}": value.clone() for name, value in network.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    sampler = SamplerDefaults("euler", steps=4, guidance=2.0)
    weights = open_weights(tmp_path / "model.safetensors")
    checkpoint = Checkpoint("pool", "pool", tmp_path, CONFIG, sampler, (10, 4), None, None, weights)
    return checkpoint, network


def test_its_tensors_are_those_of_the_module(known):
    with torch.device("meta"):
        state = PoolNetwork(CONFIG).state_dict()
    linears = CONFIG.linears()
    owned = {f"{name}.{leaf}": name for name in linears for leaf in ("weight", "bias")}
    assert set(state) == set(owned) | set(CONFIG.norms())
    assert tuple(state["blocks.1.mix.weight"].shape) == (32, 32)
    assert architecture_from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_it_is_packed_pruned_and_loaded(original, tmp_path, compute):
    checkpoint, network = original
    kept = (BlockEntry("block", 0, 8), BlockEntry("block", 2, 8))
    compress(checkpoint, LayerMap("pool", {"block": 3}, kept), tmp_path / "p.safetensors")
    header = read_header(tmp_path / "p.safetensors")
    assert header.network.blocks == (0, 2)
    assert "8.8" in describe(header)
    packed = load_packed_dit(tmp_path / "p.safetensors", compute=compute)
    x, cond = torch.randn(2, 10, 4), torch.randn(2, 5, 6)
    t = torch.full((2,), header.nodes()[1])
    expected = network.without(("block", 1))(x, t, cond)
    found = packed(x, t, cond)
    assert (found - expected).norm() <= 0.02 * expected.norm()
    assert not torch.equal(network(x, t, cond), expected)
