"""The operators: shapes under tracing, CPU kernels, and the tables that choose tiles."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitapack.kernels.linear import gemm_table, gpu_ops, reference
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import LAYOUTS, W8, WeightLayout
from vitapack.kernels.linear.weights import PackedWeight, int8_weight

ops = gpu_ops.ops


M, N, K = 6, 20, 70
COMPUTES = ("a16", "a8")
W4 = LAYOUTS["w4-b64-g64-v1"]


def random_weight(layout: WeightLayout) -> PackedWeight:
    scale = torch.rand(N)
    if layout == W8:
        return int8_weight(torch.randint(-127, 128, (N, K), dtype=torch.int8), scale)
    codes = torch.randint(0, 256, (N, 64), dtype=torch.uint8)
    group = torch.full((N, 2), 0x17, dtype=torch.uint8)  # s = 2, z = 7
    return PackedWeight(layout, {"q4": codes, "group": group, "scale": scale}, K)


def gemm_arguments(compute: str, layout: WeightLayout) -> tuple[object, ...]:
    x = torch.randn(M, K)
    first, sx = reference.quantize_activations(x) if compute == "a8" else (x, None)
    epilogue = Epilogue(torch.randn(N), 5, torch.randn(M, N), torch.randn(2, N), 3)
    return first, sx, *random_weight(layout).flat(), *epilogue.flat(), torch.float32


CASES: list[tuple[str, tuple[object, ...]]] = [
    *(("gemm", gemm_arguments(compute, layout)) for compute in COMPUTES for layout in (W8, W4)),
    ("expand", (*random_weight(W4).flat(), K, torch.float16)),
    ("expand", (*random_weight(W4).flat(), K, torch.int8)),
    ("expand", (*random_weight(W8).flat(), K, torch.bfloat16)),
    ("expand", (*random_weight(W8).flat(), K, torch.int8)),
    *(
        (name, (*tensors, quantize))
        for quantize in (False, True)
        for name, tensors in (
            ("modulate", (torch.randn(2, 3, 8), torch.randn(1, 1, 8), torch.randn(2, 1, 8))),
            ("join", (torch.randn(2, 3, 4), torch.randn(2, 3, 8), True)),
            ("join", (None, torch.randn(2, 3, 8), False)),
        )
    ),
    ("gate_residual", (torch.randn(2, 3, 8), torch.randn(1, 1, 8), torch.randn(2, 3, 8))),
    ("qk_norm", (torch.randn(2, 5, 24), torch.randn(4), torch.randn(4), 2)),
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_operators_trace_as_they_run(name: str, arguments: tuple[object, ...]) -> None:
    """Schema, fake shapes and tracing with fixed and symbolic sizes, by torch's own checker."""
    torch.library.opcheck(
        getattr(ops, name).default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_block_compiles_without_a_graph_break() -> None:
    weight, epilogue = random_weight(W4), Epilogue(torch.randn(N), 0)

    def layer(x: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        codes, steps = ops.modulate(x, shift, gate, True)
        flat = codes.flatten(0, 1), steps.flatten()
        y = gpu_ops.gemm(*flat, weight, epilogue, torch.float32)
        return y.unflatten(0, x.shape[:2])

    x, shift, gate = torch.randn(2, 3, 70), torch.randn(1, 1, 70), torch.randn(1, 1, 70)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, shift, gate), layer(x, shift, gate))


def test_the_shipped_table_covers_every_size_of_every_architecture() -> None:
    table = json.loads(gemm_table.TABLE.read_text())
    assert set(table) == set(gemm_table.ops())
    assert len(table) == 8
    pytest.importorskip("triton")
    for op in gemm_table.ops():
        assert set(table[op]) == {str(arch) for arch in gemm_table.ARCHS}
        for arch in gemm_table.ARCHS:
            rows = [row["rows"] for row in table[op][str(arch)]]
            assert rows[-1] is None
            assert rows[:-1] == sorted(rows[:-1])
            for m in (1, 16, 33, 300, 2048, 9000):
                choice = gemm_table.default_choice(op, arch, m)
                assert choice is not None
                assert choice.how in gemm_table.hows(op)
                assert (choice.tile is None) == (choice.how != "fused")


def test_other_capabilities() -> None:
    pytest.importorskip("triton")
    assert gemm_table.default_choice("w8a8", 87, 64) == gemm_table.default_choice("w8a8", 86, 64)
    assert gemm_table.default_choice("w8a8", 75, 64) is None
    assert gemm_table.default_choice("w8a8", 120, 64) is None


def test_row_buckets() -> None:
    assert [gemm_table.bucket(m) for m in (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 3764, 8884)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 4096, 12288,
    ]  # fmt: skip
    buckets = [gemm_table.bucket(m) for m in range(1, 3000)]
    assert buckets == sorted(buckets)
    assert all(m <= b <= 1.5 * m for m, b in enumerate(buckets, 1) if m > 2)


def test_the_cache_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_gemm = pytest.importorskip("vitapack.kernels.linear.triton_gemm", exc_type=ImportError)
    monkeypatch.setenv("VITAPACK_CACHE", str(tmp_path))
    gpu = (86, "NVIDIA RTX A6000")
    monkeypatch.setattr(gemm_table, "properties", lambda index: gpu)
    gemm_table.forget()
    device = torch.device("cuda:0")
    before = gemm_table.choose("w8a8", device, 4000, 1024, 4096, 0)
    assert before == gemm_table.default_choice("w8a8", 86, 4000)
    tile = triton_gemm.Tile(64, 128, 64, 4, 3)
    key = gemm_table.key_of("w8a8", 4000, 1024, 4096, 0)
    path = gemm_table.save(*gpu, {key: gemm_table.Choice("fused", tile, "")}, {key: {"us": 1.0}})
    assert path.parent == tmp_path
    assert "rtx-a6000-sm86" in path.name
    assert not list(tmp_path.glob("*.part"))
    found = gemm_table.choose("w8a8", device, 3900, 1024, 4096, 0)  # the same bucket
    assert found == gemm_table.Choice("fused", tile, "tuned on this GPU")
    assert gemm_table.choose("w8a8", device, 4000, 1024, 1024, 0) == before
    gemm_table.save(*gpu, {"w4a8 rows 1 2x64 group 64": gemm_table.Choice("expand", None, "")}, {})
    assert len(json.loads(path.read_text())["choices"]) == 2  # merged
    path.write_text('{"choices": {"w8a8 x": {"how": "magic"}}}')
    gemm_table.forget()
    with pytest.raises(ValueError, match="delete it, or run"):
        gemm_table.choose("w8a8", device, 4000, 1024, 4096, 0)
    gemm_table.forget()


def test_tuning_times_on_the_gpu_that_it_tunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of the current device say nothing of kernels on another one."""
    tune = pytest.importorskip("vitapack.kernels.linear.autotune", exc_type=ImportError)
    current, seen = [torch.device("cuda:0")], []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def fastest(*arguments: object) -> tuple[gemm_table.Choice, dict[str, object]]:
        seen.append(current[-1])
        return gemm_table.Choice("dense", None, ""), {}

    monkeypatch.setenv("VITAPACK_CACHE", str(tmp_path))
    monkeypatch.setattr(gemm_table, "properties", lambda index: (86, "NVIDIA RTX A6000"))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(tune, "_fastest", fastest)
    gemm_table.forget()
    tune.tune(torch.device("cuda:1"), [tune.Shape(16, 64, W8)], [4], ("a16",))
    assert seen == 2 * [torch.device("cuda:1")]
    gemm_table.forget()
