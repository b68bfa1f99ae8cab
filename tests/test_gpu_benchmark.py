"""`benchmarks/gpu.py` takes every path that needs no GPU, in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def test_the_rehearsal_checks_every_operator_and_runs_the_network(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal.json"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--cpu", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    names = [check["name"] for check in result["checks"]]
    assert all(check["passed"] for check in result["checks"])
    for kernel in ("a16 int8", "a16 int4-g32", "a16 int4-g128", "a8 int8", "a8 int4-g64",
                   "epilogue a8", "expand g32", "adaLN + quantize", "join GELU", "gate", "q norm",
                   "k norm", "quantize steps"):  # fmt: skip
        assert any(name.startswith(kernel) for name in names), kernel
    forms = {row["name"]: row["error"] for row in result["networks"][0]["forms"]}
    assert set(forms) == {"fp16", "int8 a16", "int8 a8", "int4 a16", "int4 a8"}
    assert forms["fp16"] < 0.003
    assert forms["int8 a16"] < forms["int8 a8"] < 0.02
    assert forms["int4 a8"] < 1.2 * forms["int4 a16"] < 0.15
    page = out.with_suffix(".md").read_text()
    assert "Checks: " in page
    assert "| 4 + 3 | int4 a8 |" in page


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA GPU here" in done.stderr
