"""Every Triton kernel, through Triton's interpreter, against the reference.

Run by `test_triton_interpreted.py` in a process of its own: TRITON_INTERPRET=1 must be set before
triton is imported, and compiling ahead of time is impossible from then on.
"""

from pathlib import Path

import pytest
import torch
from alive_tensors import peak
from torch import Tensor

from benchmarks.gpu import run as gpu
from vitapack.kernels.linear import autotune as tune
from vitapack.kernels.linear import (
    gemm_table,
    gpu_ops,
    reference,
    triton_gemm,
    triton_rows,
    weights,
)
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import LAYOUTS, W4, W8, WeightLayout
from vitapack.kernels.linear.triton_gemm import Tile
from vitapack.kernels.linear.weights import PackedWeight, dequantize, expand, int8_weight
from vitapack.runtime.engines.gpu_dit import GpuDiT
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.networks.modulation import StepModulation
from vitapack.runtime.networks.network import CallShape

torch.set_num_threads(1)
TILE = Tile(16, 16, 64, 4, 2)
PACKED = [layout for layout in LAYOUTS.values() if layout.packed]
SHAPES = [(1, 64, 64), (37, 50, 200), (16, 1, 7), (33, 17, 129)]  # M, N, K


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def weight(n: int, k: int, layout: WeightLayout) -> PackedWeight:
    """A weight with every kind of group that a file may hold."""
    if not layout.group:
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        w8[0, 0], w8[-1, -1] = -127, 127
        return int8_weight(w8, torch.rand(n) * 1e-3)
    padded = layout.padded(k)
    z = torch.randint(0, 16, (n, layout.groups(k)))
    s = torch.randint(1, 17, z.shape)
    wide_s, wide_z = (y.repeat_interleave(layout.group, 1)[:, :padded] for y in (s, z))
    codes = torch.randint(0, 16, (n, padded))
    reach = 127 // wide_s  # codes whose weight would leave +-127 are drawn to the edge
    codes = torch.minimum(torch.maximum(codes, wide_z - reach), wide_z + reach)
    codes[:, k:] = wide_z[:, k:]
    group = weights.pack_group(s, z)
    made = weights.from_codes(layout, k, codes.to(torch.uint8), torch.rand(n) * 1e-3, group)
    weights.check(made)
    return made


def close(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Our error is at most twice that of plain PyTorch in the same precision, plus one rounding."""
    assert torch.equal(ours.isnan(), exact.isnan())
    rounding = exact.nan_to_num().abs().max() * torch.finfo(ours.dtype).eps
    error = (ours.double() - exact).nan_to_num().abs().max()
    assert error <= 2 * (plain.double() - exact).nan_to_num().abs().max() + rounding


@pytest.mark.parametrize("layout", PACKED, ids=lambda layout: layout.id)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_only(shape: tuple[int, int, int], layout: WeightLayout) -> None:
    m, n, k = shape
    w, bias = weight(n, k, layout), torch.randn(n).half()
    x = torch.randn(m, k).half()
    ours = triton_gemm.gemm(x, w, epilogue=Epilogue(bias), tile=TILE, plain=True)
    exact = x.double() @ (expand(w).double() * w.scale.double()[:, None]).t() + bias.double()
    close(ours, reference.linear_a16_ref(x.float(), w, bias.float()).half(), exact)


@pytest.mark.parametrize("layout", PACKED, ids=lambda layout: layout.id)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_activations_are_exact(shape: tuple[int, int, int], layout: WeightLayout) -> None:
    m, n, k = shape
    w = weight(n, k, layout)
    xq, sx = reference.quantize_activations(torch.randn(m, k))
    ours = triton_gemm.gemm(xq, w, sx=sx, dtype=torch.float32, tile=TILE, plain=True)
    assert torch.equal(ours, reference.int8_matmul(xq, expand(w)).float() * sx * w.scale)


@pytest.mark.parametrize("layout", PACKED, ids=lambda layout: layout.id)
def test_tiles_of_two_blocks_and_strided_rows(layout: WeightLayout) -> None:
    w = weight(20, 256, layout)
    rows = torch.randn(9, 300).half()[:, 20:276]  # a view: rows 300 apart
    ours = triton_gemm.gemm(rows, w, tile=Tile(16, 32, 128, 4, 2), plain=True)
    exact = rows.double() @ (expand(w).double() * w.scale.double()[:, None]).t()
    close(ours, exact.half(), exact)


@pytest.mark.parametrize("a8", [False, True])
def test_epilogue(a8: bool) -> None:
    """Bias, GELU of the right columns, gate of each batch and residual, in that order."""
    (batch, tokens, n, k), gelu_from = (3, 18, 22, 64), 9
    w, bias = weight(n, k, LAYOUTS["w4-b64-g64-v1"]), torch.randn(n).half()
    x, gate = torch.randn(batch * tokens, k).half(), torch.randn(batch, n).half()
    residual = torch.randn(batch * tokens, 40).half()[:, :n]
    xq, sx = reference.quantize_activations(x)
    first, step = (xq, sx) if a8 else (x, None)
    for g in (gate, gate[:1], torch.randn(batch, 2 * n).half()[:, n:]):
        epilogue = Epilogue(bias, gelu_from, residual, g, tokens)
        ours = triton_gemm.gemm(first, w, sx=step, epilogue=epilogue, tile=TILE, plain=True)
        expected = reference.gemm_ref(first, step, w, epilogue, torch.float32)
        assert (ours.float() - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_nan_and_outliers() -> None:
    w = weight(16, 64, W4[0])
    x = torch.randn(6, 64).half()
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0
    x[4, 7], x[5] = 448, torch.randn(64) * 1e-7  # an outlier, and fp16 denormals
    for quantized in (False, True):
        first, step = triton_rows.join(None, x, False, True) if quantized else (x, None)
        ours = triton_gemm.gemm(first, w, sx=step, tile=TILE, plain=True, dtype=torch.float32)
        finite = [0, 3, 4, 5]
        assert ours[finite].isfinite().all()
        assert not ours[[1, 2]].isfinite().any()
        assert not ours[3].any()
        exact = x[finite].double() @ (expand(w).double() * w.scale.double()[:, None]).t()
        error = (ours[finite].double() - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)
        assert error.max() < (0.03 if quantized else 1e-5)


@pytest.mark.parametrize("layout", PACKED, ids=lambda layout: layout.id)
@pytest.mark.parametrize("k", [64, 200, 7])
def test_expand(k: int, layout: WeightLayout) -> None:
    w = weight(70, k, layout)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        if dtype == torch.int8 and not layout.group:
            continue
        ours = triton_gemm.expand(w, dtype, plain=True)
        expected = expand(w) if dtype == torch.int8 else dequantize(w).to(dtype)
        if dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off instead of rounding it
            assert torch.allclose(ours.float(), expected.float(), rtol=2**-7)
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("width", [1, 40, 129])
def test_quantize_has_the_bits_of_the_reference(width: int) -> None:
    x = torch.randn(2, 9, width)
    x[0, 1, 0], x[0, 2, 0], x[1, 3], x[1, 4] = float("nan"), float("-inf"), 0, 1e-40
    x[1, 5, 0] = 448
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype == torch.bfloat16:  # whose denormals the interpreter takes for zeros
            x[1, 4] = 0
        codes, sx = triton_rows.join(None, x.to(dtype), False, True)
        expected, steps = reference.quantize_activations(x.to(dtype))
        assert torch.equal(codes, expected)
        assert torch.equal(sx.isnan(), steps.isnan())
        assert torch.equal(sx.nan_to_num(), steps.nan_to_num())


@pytest.mark.parametrize("batch", [1, 3])
def test_modulate(batch: int) -> None:
    """Shifts and scales are chunks of one modulation row, as the network makes them."""
    x = torch.randn(3, 5, 40).half()
    x[0, 1, 2], x[1, 1] = float("nan"), 3
    x[2, 2, 5] = 3000
    shift, scale, _ = torch.randn(batch, 1, 120).half().chunk(3, dim=-1)
    wide = reference.modulate_ref(x, shift, scale)
    exact = reference.modulate_ref(x.double().float(), shift, scale).double()
    plain = (1 + scale) * torch.nn.functional.layer_norm(x, (40,), eps=1e-6) + shift
    close(triton_rows.modulate(x, shift, scale, False)[0], plain, exact)
    codes, sx = triton_rows.modulate(x, shift, scale, True)
    expected, steps = reference.quantize_activations(wide)
    assert (codes.int() - expected.int()).abs().max() <= 1  # a last bit of the statistics
    assert (codes != expected).float().mean() < 0.01
    assert torch.equal(sx.isnan(), steps.isnan())
    assert torch.allclose(sx.nan_to_num(), steps.nan_to_num(), rtol=1e-5)


@pytest.mark.parametrize("left", [0, 24])
def test_join_and_gelu(left: int) -> None:
    whole = (3 * torch.randn(2, 5, 100)).half()
    right = whole[..., 30:67]  # a strided part of the first linear's output
    right[0, 0, 0] = float("nan")
    first = torch.randn(2, 5, left).half() if left else None
    wide = reference.join_ref(first, right, True)
    exact = torch.nn.functional.gelu(right.double(), approximate="tanh")
    exact = exact if first is None else torch.cat([first.double(), exact], -1)
    close(triton_rows.join(first, right, True, False)[0], wide.half(), exact)
    codes, sx = triton_rows.join(first, right, True, True)
    expected, steps = reference.quantize_activations(wide)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert torch.equal(sx.isnan(), steps.isnan())
    assert torch.allclose(sx.nan_to_num(), steps.nan_to_num(), rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_gate_residual(batch: int) -> None:
    x, y = torch.randn(2, 5, 40).half(), torch.randn(2, 5, 80).half()[..., 40:]
    gate = torch.randn(batch, 1, 120).half()[..., 40:80]
    ours = triton_rows.gate_residual(x, gate, y)
    close(ours, x + gate * y, x.double() + gate.double() * y.double())


@pytest.mark.parametrize("heads", [1, 3])
def test_qk_norm(heads: int) -> None:
    """From the front of the single block's first linear, head size no power of two."""
    dim = 20
    qkv = torch.randn(2, 7, 3 * heads * dim + 11).half()[..., : 3 * heads * dim]
    scales = torch.randn(dim).half(), torch.randn(dim).half()
    ours = triton_rows.qk_norm(qkv, *scales, heads)
    exact = reference.qk_norm_ref(qkv.double(), *scales, heads)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == (2, heads, 7, dim)
        close(a, b.half(), b.double())


def test_empty() -> None:
    x = torch.empty(0, 64).half()
    out = triton_gemm.gemm(x, weight(16, 64, W4[1]), tile=TILE, plain=True)
    assert out.shape == (0, 16)
    assert triton_rows.join(None, x, False, True)[0].shape == (0, 64)


def test_mistakes_are_refused() -> None:
    w = weight(16, 64, W8)
    x = torch.randn(8, 64).half()
    epilogue = Epilogue(None, None, x[:, :16], torch.randn(2, 16).half(), 4)
    with pytest.raises(ValueError, match="a tile of 16 rows would need three"):
        triton_gemm.gemm(x, w, tile=TILE, plain=True, epilogue=epilogue)
    with pytest.raises(ValueError, match="expected int8 with sx"):
        triton_gemm.gemm(torch.randn(2, 64), w, tile=TILE, plain=True)
    with pytest.raises(ValueError, match="contiguous"):
        triton_gemm.gemm(torch.randn(64, 2).half().t(), w, tile=TILE, plain=True)
    assert gpu_ops.ops is not None


def test_tuning_keeps_only_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the times mean nothing; the way to a saved choice is the GPU's own."""
    monkeypatch.setenv("VITAPACK_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "TILES", ((16, 16, 4, 2), (16, 64, 4, 2)))
    device = torch.device("cpu")
    done: list[str] = []
    shapes = [tune.Shape(20, 70, W4[0]), tune.Shape(20, 70, W8)]
    chosen = tune.tune(device, shapes, [3], report=lambda i, n, what: done.append(what))
    assert len(chosen) == 8  # two widths, two activation modes, with and without gate
    assert done[-1] == "tuned"
    for key, row in chosen.items():
        assert row["tried"] >= 4, key
        op, shape = key.split(" ")[0], shapes[0 if "w4" in key else 1]
        chosen_now = gemm_table.choose(op, device, 3, 20, 70, shape.layout.group)
        assert chosen_now.source == "tuned on this GPU"
    assert tune.tune(device, shapes, [3]) == {}  # an interrupted run goes on where it was
    with torch.no_grad():  # a kernel that gives wrong numbers is never chosen
        good = gpu_ops.run_choice
        monkeypatch.setattr(
            tune, "run_choice", lambda choice, *rest: good(choice, *rest) + (choice.how == "fused")
        )
        row = tune.tune(device, [shapes[1]], [3], ("a16",), again=True)
        assert {entry["how"] for entry in row.values()} <= {"dense", "apart"}
        with pytest.raises(RuntimeError, match="no candidate agrees"):
            tune.tune(device, [shapes[1]], [3], ("a8",), again=True)

        def refusing(error: Exception) -> None:
            def run(choice: gemm_table.Choice, *rest: object) -> Tensor:
                if choice.how == "fused":
                    raise error
                return good(choice, *rest)

            monkeypatch.setattr(tune, "run_choice", run)

        # One that the compiler refuses, or that `check_words` does, is left out like a wrong one.
        refusing(triton_gemm.SplitWords("splits an int4 word over rows"))
        row = tune.tune(device, [shapes[1]], [3], ("a16",), again=True)
        assert {entry["how"] for entry in row.values()} <= {"dense", "apart"}
        refusing(torch.cuda.OutOfMemoryError("CUDA out of memory"))  # the next GEMM may be smaller
        assert tune.tune(device, [shapes[1]], [3], ("a8",), again=True) == {}
        refusing(TypeError("a mistake"))
        with pytest.raises(TypeError, match="a mistake"):
            tune.tune(device, [shapes[1]], [3], ("a8",), again=True)
    gemm_table.forget()


@pytest.mark.parametrize(
    ("doubles", "singles", "compute"), [(1, 0, "a16"), (0, 1, "a16"), (0, 1, "a8")]
)
def test_a_step_holds_what_is_predicted(
    doubles: int, singles: int, compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GEMMs allocate inside included: scratches, and GELU and gate after cuBLAS."""
    config = gpu.mini(64, doubles, singles, 8, 16)
    dit = gpu.random_network(config, W8, torch.device("cpu"))
    shapes = set()
    for module in dit.modules():
        if isinstance(module, PackedLinear):
            module.compute = compute
            shapes.add((module.out_features, module.in_features))
    x, cond = torch.randn(1, 100, 8).half(), torch.randn(1, 60, 16).half()
    # As with thousands of rows: weights are expanded for cuBLAS.
    monkeypatch.setenv("VITAPACK_CACHE", str(tmp_path))
    dense = {
        gemm_table.key_of(op, rows, n, k, 0): gemm_table.Choice("dense", None, "")
        for op in ("w8a16", "w8a16+gate") for rows in (60, 100, 160) for n, k in shapes
    }  # fmt: skip
    gemm_table.save(*gemm_table.properties(None), dense, {})
    when = StepModulation(rows=torch.zeros(1, dtype=torch.long))
    gpu_kernels = {name: kernels[0] for name, kernels in gpu_ops._KERNELS.items()}
    found = peak(lambda x, cond: dit.velocity(x, when, cond), x, cond, inside=gpu_kernels)
    gemm_table.forget()
    call = CallShape((100, 8), 60, 1, torch.float16, compute, True)
    predicted = GpuDiT.step_bytes(config, call)
    assert found == pytest.approx(predicted, rel=0.1)
