"""The kernels on a GPU: the same checks as `benchmarks/gpu/run.py`, and what only a GPU can
show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import run as gpu
from vitapack.kernels.linear import support
from vitapack.kernels.linear.layouts import LAYOUTS, W8, WeightLayout

pytestmark = pytest.mark.gpu
W4 = LAYOUTS["w4-b64-g64-v1"]
SHAPES = [(1, 64, 64), (1, 1024, 1024), (37, 50, 200), (16, 1, 7), (300, 1024, 1024),
          (2100, 256, 1024)]  # fmt: skip


@pytest.fixture
def device() -> torch.device:
    found = torch.device("cuda", 0)
    ready, why = support.gpu_support(found)
    if not ready:
        pytest.skip(why)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gemms(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for check in gpu_checks.gemm_checks(device, [shape], (dtype,)):
        assert check.passed, check


def test_expansion_and_row_kernels(device: torch.device) -> None:
    shapes = [(2, 7, 40), (2, 300, 1024), (1, 3, 2048)]
    for check in (
        *gpu_checks.expand_checks(device, 70, 200),
        *gpu_checks.row_checks(device, shapes),
    ):
        assert check.passed, check


@pytest.mark.parametrize("compute", ["a16", "a8"])
@pytest.mark.parametrize("layout", [W8, W4])
def test_a_step_as_a_cuda_graph(device: torch.device, layout: WeightLayout, compute: str) -> None:
    """The graph gives the eager step's numbers, also for inputs that it was not recorded with."""
    from vitapack.runtime.engines.cuda_graph import Recording
    from vitapack.runtime.networks.linear import PackedLinear
    from vitapack.runtime.networks.modulation import StepModulation

    config = gpu.mini(128, 1, 1, 8, 16)
    with torch.inference_mode():
        dit = gpu.random_network(config, layout, device)
        for module in dit.modules():
            if isinstance(module, PackedLinear):
                module.compute = compute
        x = torch.randn(2, 70, 8, device=device).half()
        cond = torch.randn(2, 33, 16, device=device).half()
        when = StepModulation(rows=torch.zeros(1, dtype=torch.long, device=device))
        recording = Recording(lambda x, cond: dit.velocity(x, when, cond), (x, cond), None)
        for _ in range(2):
            x = torch.randn_like(x)
            assert torch.equal(recording(x, cond), dit.velocity(x, when, cond))


@pytest.mark.parametrize("compute", ["a16", "a8"])
def test_a_step_compiles(device: torch.device, compute: str) -> None:
    from vitapack.runtime.networks.linear import PackedLinear
    from vitapack.runtime.networks.modulation import StepModulation

    with torch.inference_mode():
        dit = gpu.random_network(gpu.mini(128, 1, 1, 8, 16), W8, device)
        for module in dit.modules():
            if isinstance(module, PackedLinear):
                module.compute = compute
        x = torch.randn(2, 70, 8, device=device).half()
        cond = torch.randn(2, 33, 16, device=device).half()
        when = StepModulation(rows=torch.zeros(1, dtype=torch.long, device=device))
        step = torch.compile(dit.velocity, fullgraph=True)
        expected = dit.velocity(x, when, cond).float()
        assert (step(x, when, cond).float() - expected).norm() < 1e-2 * expected.norm()


def test_tuning(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitapack.kernels.linear import autotune as tune
    from vitapack.kernels.linear import gemm_table

    monkeypatch.setenv("VITAPACK_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "TILES", tune.TILES[:3])
    gemm_table.forget()
    chosen = tune.tune(device, [tune.Shape(256, 256, W4)], [300])
    assert len(chosen) == 4
    key = gemm_table.key_of("w4a8", 300, 256, 256, 64)
    found = gemm_table.choose("w4a8", device, 300, 256, 256, 64)
    assert found is not None
    assert found.source == "tuned on this GPU"
    assert key in chosen
    gemm_table.forget()
