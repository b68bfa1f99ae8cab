"""What `vitapack tune` measures, and what it says where it cannot."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import run as gpu
from vitapack.kernels.linear import support
from vitapack.kernels.linear.layouts import W4, W8
from vitapack.runtime.engines import gpu_dit as dit_gpu
from vitapack.runtime.errors import UserError
from vitapack.runtime.networks.blocks import Condition
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.tools.tune import describe, rows_of, shapes_of, tune_packed

GOLDEN = Path(__file__).parents[2] / "data" / "packed_v1.safetensors"


def test_the_shapes_are_those_of_the_file() -> None:
    shapes = shapes_of(GOLDEN)
    assert len(shapes) == len(set(shapes))
    assert {layout for *_, layout in shapes} == {W8, W4[0]}  # its single block has 8 bits
    assert all(n > 0 and k > 0 for n, k, _ in shapes)


def test_the_rows_are_those_of_a_guided_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both passes: with the picture's tokens, and with the one that stands for all others."""
    config = gpu.mini(64, 1, 1, 8, 16)
    network = gpu.random_network(config, W8, torch.device("cpu"))
    seen, project = set(), dit_gpu.project

    def noted(linear: object, rows: tuple[torch.Tensor, object], *rest: object, **more: object):
        seen.add(rows[0].shape[:-1].numel())
        return project(linear, rows, *rest, **more)

    monkeypatch.setattr(dit_gpu, "project", noted)
    when = StepModulation(rows=torch.zeros(1, dtype=torch.long))
    x, cond = torch.randn(1, 50, 8).half(), torch.randn(1, 30, 16).half()
    for tokens, repeats in ((cond, 1), (cond[:, :1], 30)):
        network.velocity(x, when, Condition(tokens, repeats))
    assert sorted(seen) == rows_of([50, 30])


def test_what_is_no_device_is_one_plain_line() -> None:
    with pytest.raises(UserError, match="no device 'rubbish': expected cuda"):
        tune_packed(GOLDEN, [512, 1370], device="rubbish")


def test_without_a_gpu_it_is_one_plain_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="no CUDA GPU for 'cuda:0'"):
        tune_packed(GOLDEN, [512, 1370])


def test_a_gpu_that_is_not_there_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="no device 'cuda:2': torch sees 2 CUDA GPUs"):
        tune_packed(GOLDEN, [512, 1370], device="cuda:2")


def test_hardware_without_kernels_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(support, "gpu_support", lambda device: (False, "no kernels for sm_120"))
    with pytest.raises(UserError, match="nothing to tune: no kernels for sm_120"):
        tune_packed(GOLDEN, [512, 1370])


def test_the_summary_compares_with_the_default() -> None:
    row = {"how": "fused", "tile": "", "us": 50.0, "default_us": 60.0, "tried": 3}
    text = describe({"gpu": "X", "cache": "c.json", "choices": {"w8a8 rows 4 1x2 group 0": row}})
    assert "1.20x of the default" in text
