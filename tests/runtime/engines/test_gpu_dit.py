"""The GPU's order of arithmetic, run on the CPU where its operators are the reference."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from readable import readable
from tiny_model import MIXED, tiny_checkpoint, tiny_map
from torch import Tensor

from vitapack.compressor.packing.compress import compress
from vitapack.kernels.linear import cpu, support
from vitapack.runtime.engines.choose import Execution, network_of
from vitapack.runtime.engines.gpu_dit import GpuDiT
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.loading.packed import load_packed_dit
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.dit import DiT


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, DiT]:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def both_forms(path: Path, compute: str) -> tuple[DiT, GpuDiT]:
    """A packed file's network in its readable form and in the GPU's, over the same modules."""
    plain = load_packed_dit(path, compute=compute)
    plain = plain if type(plain) is DiT else copy.copy(plain)
    fused = network_of(plain.config, Execution("cuda", torch.float16, path="triton"))
    assert isinstance(fused, GpuDiT)
    fused._modules = plain._modules
    return plain, fused


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 7, 4, generator=rng), torch.randn(2, 5, 6, generator=rng)
    return x, torch.full((2,), 0.5), cond


@pytest.mark.parametrize("modulation", ["table", "int8"])
@pytest.mark.parametrize("layers", [tiny_map(8), MIXED], ids=["int8", "mixed"])
def test_fused_blocks_equal_the_readable_ones(
    original: tuple[Checkpoint, DiT], tmp_path: Path, layers: LayerMap, modulation: str
) -> None:
    path = tmp_path / "p.safetensors"
    compress(original[0], layers, path, modulation=modulation, steps=(2,))
    x, t, cond = inputs()
    t = torch.zeros(2)
    for compute in ("a16", "a8"):
        plain, fused = both_forms(path, compute)
        expected = readable(DiT, plain, x, t, cond)
        ours = fused.velocity(x, fused.step_modulation(t), cond)
        # In int8 a code may fall on the other side of a rounding: a step in 127 of one value.
        limit = 1e-5 if compute == "a16" else 1e-2
        assert (ours - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_one_token_stands_for_equal_ones(
    original: tuple[Checkpoint, DiT], tmp_path: Path, compute: str
) -> None:
    compress(original[0], MIXED, tmp_path / "p.safetensors", modulation="int8", steps=(2,))
    _, fused = both_forms(tmp_path / "p.safetensors", compute)
    x, t, cond = inputs()
    when, one = fused.step_modulation(t), cond[:, :1]
    many = fused.velocity(x, when, one.expand(-1, 500, -1))
    found = fused.velocity(x, when, Condition(one, 500))
    assert (found - many).norm() <= (1e-5 if compute == "a16" else 1e-2) * many.norm()
    assert (found - fused.velocity(x, when, one)).norm() > 0.05 * many.norm()


def test_one_condition_serves_the_whole_batch(
    original: tuple[Checkpoint, DiT], tmp_path: Path
) -> None:
    compress(original[0], MIXED, tmp_path / "p.safetensors", modulation="int8", steps=(2,))
    _, fused = both_forms(tmp_path / "p.safetensors", "a8")
    x, t, cond = inputs()
    when = fused.step_modulation(t[:1])
    single = fused.velocity(x, when, cond[:1])
    assert torch.equal(single, fused.velocity(x, when, cond[:1].expand(2, -1, -1)))


def test_the_step_traces_whole(
    original: tuple[Checkpoint, DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile takes a step without a graph break, as CUDA graphs do without a sync."""
    monkeypatch.setattr(cpu, "available", lambda: False)  # as on a GPU: weights as in the file
    compress(original[0], MIXED, tmp_path / "p.safetensors", modulation="int8", steps=(2,))
    _, fused = both_forms(tmp_path / "p.safetensors", "a8")
    x, t, cond = inputs()
    when = fused.step_modulation(t)
    step = torch.compile(fused.velocity, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(step(x, when, cond), fused.velocity(x, when, cond))


def test_elsewhere_it_is_the_readable_network(
    original: tuple[Checkpoint, DiT], tmp_path: Path
) -> None:
    compress(original[0], MIXED, tmp_path / "p.safetensors", modulation="int8", steps=(2,))
    plain, fused = both_forms(tmp_path / "p.safetensors", "a16")
    x, t, cond = inputs()
    assert torch.equal(fused(x, t, cond), readable(DiT, plain, x, t, cond))


def test_unknown_hardware_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vitapack.kernels.linear import gemm_table

    device = torch.device("cuda:7")
    monkeypatch.setattr(support, "_fault", lambda device: "")
    for arch, ready in ((75, False), (120, False), (86, True), (87, True)):
        support.gpu_support.cache_clear()
        support.announce.cache_clear()
        monkeypatch.setattr(gemm_table, "arch_of", lambda device, arch=arch: arch)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vitapack.kernels"):
            assert support.gpu_kernels("int8 a8 linear", device) is ready
            assert support.gpu_kernels("int8 a8 linear", device) is ready
        lines = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(lines) == (0 if ready else 1)
        assert ready or f"no kernels for sm_{arch}" in lines[0].getMessage()
    support.gpu_support.cache_clear()


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify"), "find C compiler. Please"),
        (torch.zeros(1, 16), "a first kernel gave wrong numbers"),
        (torch.full((1, 16), 127), ""),
    ],
)
def test_a_triton_that_cannot_launch_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, codes: object, said: str
) -> None:
    """A machine without a compiler, a driver older than ptxas: plain PyTorch, not a traceback."""
    from vitapack.kernels.linear import gemm_table, gpu_ops

    def join(*arguments: object) -> tuple[object, None]:
        if isinstance(codes, Exception):
            raise codes
        return codes, None

    device = torch.device("cpu")  # where a tensor can be made
    monkeypatch.setattr(gemm_table, "arch_of", lambda device: 86)
    monkeypatch.setattr(gpu_ops, "ops", SimpleNamespace(join=join))
    support.gpu_support.cache_clear()
    support.announce.cache_clear()
    with caplog.at_level(logging.WARNING, logger="vitapack.kernels"):
        assert support.gpu_kernels("DiT", device) is not bool(said)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == bool(said)
    assert not said or (said in lines[0] and "does not work on this machine" in lines[0])
    support.gpu_support.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_on_a_gpu(original: tuple[Checkpoint, DiT], tmp_path: Path, compute: str) -> None:
    path = tmp_path / "p.safetensors"
    compress(original[0], MIXED, path, modulation="int8", steps=(2,))
    x, t, cond = inputs()
    expected = load_packed_dit(path, compute=compute)(x, t, cond)
    dit = load_packed_dit(path, device="cuda", compute=compute)
    ours = dit(x.half().cuda(), t.cuda(), cond.half().cuda()).float().cpu()
    assert (ours - expected).norm() <= (1e-2 if compute == "a16" else 3e-2) * expected.norm()
