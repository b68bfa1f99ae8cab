"""`benchmarks/gpu/run.py` takes every path that needs no GPU, in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


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


def test_what_cannot_run_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel, a rival, a check, a network for which there is no memory: a line each."""
    import torch

    from benchmarks.gpu import checks as gpu_checks
    from benchmarks.gpu import run as gpu

    def refuse(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    random_network = gpu.random_network
    monkeypatch.setattr(gpu, "_expand_and_multiply", refuse)
    monkeypatch.setattr(gpu_checks, "row_checks", refuse)
    monkeypatch.setattr(
        gpu,
        "random_network",
        lambda config, layout, device: (random_network if layout.packed else refuse)(
            config, layout, device
        ),
    )
    pages: list[str] = []
    with torch.inference_mode():
        result = gpu.run(
            torch.device("cpu"), True, 1, lambda result: pages.append(gpu.markdown(result))
        )
    named = [row["what"] for row in result["broken"]]
    assert named == [
        "checks of row kernels (2, 4, 64)", "GEMM 20x16x64, w8 expand + cuBLAS",
        "GEMM 20x16x64, w4-g64 expand + cuBLAS", "network of 4 + 3 tokens, fp16",
    ]  # fmt: skip
    why = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert {row["why"] for row in result["broken"]} == {why}
    assert f"NOT RUN {named[0]}: {why}\n" in capsys.readouterr().err
    assert result["checks"]
    assert {"cuBLAS fp16", "w8a16", "w4-g64a8"} <= set(result["gemms"][0]["times"])
    forms = {row["name"]: row["speedup"] for row in result["networks"][0]["forms"]}
    assert forms == dict.fromkeys(["int8 a16", "int8 a8", "int4 a16", "int4 a8"])
    assert len(pages) == 4  # and each of them a page, with what there was so far
    assert f"- NOT RUN {named[-1]}: {why}" in pages[-1]
    assert "| 4 + 3 | int4 a8 |" in pages[-1]


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA GPU here" in done.stderr
