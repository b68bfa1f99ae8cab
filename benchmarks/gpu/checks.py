"""Checks every GPU operator's numerics against float64, for `benchmarks/gpu/run.py`.

Criterion: our error is at most twice that of plain PyTorch in the same precision, plus one rounding
of the output. With int8 activations the integer product is exact, so the result must agree with the
reference up to rounding. A NaN in a row must give NaN in that row, and in no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear import gpu_ops, reference
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import LAYOUTS, WeightLayout
from vitapack.kernels.linear.weights import (
    PackedWeight,
    dequantize,
    expand,
    from_codes,
    int8_weight,
    pack_group,
)

ops = gpu_ops.ops
SERVED = [layout for layout in LAYOUTS.values() if "triton" in layout.kernels]


@dataclass(frozen=True)
class Check:
    """One comparison: the largest error relative to the largest value, and the allowed one."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def random_weight(n: int, k: int, layout: WeightLayout, device: torch.device) -> PackedWeight:
    """A weight that covers every s and z and both ends of int8, as far as n * k allows."""
    rng = torch.Generator().manual_seed(n * k + layout.group)
    scale = (torch.rand(n, generator=rng) * 1e-3 + 1e-4).to(device)
    if not layout.group:
        w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=rng).to(device)
        return int8_weight(w8, scale)
    padded = layout.padded(k)
    shape = (n, layout.groups(k))
    z = torch.randint(0, 16, shape, generator=rng)
    s = torch.randint(1, 17, shape, generator=rng)
    wide_s, wide_z = (y.repeat_interleave(layout.group, 1)[:, :padded] for y in (s, z))
    codes = torch.randint(0, layout.largest + 1, (n, padded), generator=rng)
    reach = 127 // wide_s
    codes = torch.minimum(torch.maximum(codes, wide_z - reach), wide_z + reach)
    codes[:, k:] = wide_z[:, k:]
    weight = from_codes(layout, k, codes.to(torch.uint8), scale, pack_group(s, z).to(device))
    return weight.to(device)


def short(layout: WeightLayout) -> str:
    """A layout in a label: "int4-g64"."""
    return layout.name.replace(" group ", "-g")


def compare(name: str, ours: Tensor, plain: Tensor, exact: Tensor, roundings: int = 1) -> Check:
    """Errors relative to the largest exact value; NaNs must be exactly those of `exact`."""
    exact = exact.double()
    if ours.shape != exact.shape or not torch.equal(ours.isnan(), exact.isnan()):
        return Check(name, float("nan"), 0.0)
    size = exact.nan_to_num().abs().max().clamp(min=1e-30)

    def error(y: Tensor) -> float:
        return float(((y.double() - exact).nan_to_num().abs().max() / size).item())

    return Check(name, error(ours), 2 * error(plain) + roundings * torch.finfo(ours.dtype).eps)


def gemm_checks(
    device: torch.device, shapes: list[tuple[int, int, int]], dtypes: tuple[torch.dtype, ...]
) -> Iterator[Check]:
    """All bits, groups and activation modes at M, N, K; then each epilogue."""
    for m, n, k in shapes:
        for layout in SERVED:
            weight = random_weight(n, k, layout, device)
            label = f"{short(layout)} {m}x{n}x{k}"
            w8 = expand(weight).double()
            dense = w8 * weight.scale.double()[:, None]
            for dtype in dtypes:
                x = torch.randn(m, k, device=device).to(dtype)
                x[m // 2, k // 2] = 448
                if m > 2:
                    x[1], x[2, 0] = 0, float("nan")
                bias = torch.randn(n, device=device).to(dtype)
                name = f"{label} {str(dtype).removeprefix('torch.')}"
                y = gpu_ops.gemm(x, None, weight, Epilogue(bias), dtype)
                exact = x.double() @ dense.t() + bias.double()
                plain = F.linear(x, dense.to(dtype), bias)
                yield compare(f"a16 {name}", y, plain, exact)

                codes, steps = ops.join(None, x, False, True)
                # On the CPU: torch's CUDA division by a number multiplies by its reciprocal.
                same, same_steps = (y.to(device) for y in reference.quantize_activations(x.cpu()))
                yield compare(f"quantize {name}", codes.float(), same.float(), same)
                yield compare(f"quantize steps {name}", steps, same_steps, same_steps)
                y = gpu_ops.gemm(codes, steps, weight, Epilogue(bias), torch.float32)
                exact = (codes.double() @ w8.t()) * steps.double() * weight.scale
                exact = exact + bias.double()
                # The sum to float32, two scales and the bias: four roundings.
                yield compare(f"a8 {name}", y, exact.float(), exact, roundings=4)
        # The epilogue, once per shape: two batches with a gate each, GELU on the last columns.
        tokens = max(1, m // 2)
        rows = min(2 * tokens, m)
        x = torch.randn(rows, k, device=device).half()
        residual = torch.randn(rows, n, device=device).half()
        gate = torch.randn(-(-rows // tokens), n, device=device).half()
        bias = torch.randn(n, device=device).half()
        for sx in (None, True):
            first, steps = ops.join(None, x, False, True) if sx else (x, None)
            epilogue = Epilogue(bias, n // 3, residual, gate, tokens)
            y = gpu_ops.gemm(first, steps, weight, epilogue, torch.float16)
            exact = reference.gemm_ref(first, steps, weight, epilogue, torch.float32)
            yield compare(f"epilogue {'a8' if sx else 'a16'} {m}x{n}x{k}", y, exact.half(), exact)


def expand_checks(device: torch.device, n: int, k: int) -> Iterator[Check]:
    for layout in SERVED:
        weight = random_weight(n, k, layout, device)
        for dtype in (torch.float16, torch.float32, torch.int8):
            if dtype == torch.int8 and not layout.group:
                continue
            y = gpu_ops.expand(weight, dtype).float()
            expected = expand(weight).float()
            if dtype.is_floating_point:
                expected = dequantize(weight).to(dtype).float()
            name = f"expand g{layout.group} {n}x{k} {str(dtype).removeprefix('torch.')}"
            # Bit for bit, except that a fused rounding may differ in the last place.
            yield compare(name, y, expected, expected)


def row_checks(device: torch.device, shapes: list[tuple[int, int, int]]) -> Iterator[Check]:
    """The row kernels at (batch, tokens, width) in fp16; modulation is a chunk of a wider row."""
    for batch, tokens, width in shapes:
        x = torch.randn(batch, tokens, width, device=device).half()
        if tokens > 2:
            x[0, 1, 0], x[0, 2] = float("nan"), 3
        wide = torch.randn(batch, 1, 3 * width, device=device).half()
        shift, scale, gate = wide.chunk(3, dim=-1)
        label = f"{batch}x{tokens}x{width}"
        exact = reference.modulate_ref(x, shift, scale)
        plain = (1 + scale) * F.layer_norm(x, (width,), eps=1e-6) + shift
        yield compare(f"adaLN {label}", ops.modulate(x, shift, scale, False)[0], plain, exact)
        codes, steps = ops.modulate(x, shift, scale, True)
        yield quantized(f"adaLN + quantize {label}", codes, steps, exact)

        right = torch.randn(batch, tokens, width + 8, device=device).half()[..., 8:]
        exact = reference.join_ref(x, right, True)
        plain = torch.cat([x, F.gelu(right, approximate="tanh")], -1)
        yield compare(f"join GELU {label}", ops.join(x, right, True, False)[0], plain, exact)
        yield quantized(f"join GELU + quantize {label}", *ops.join(x, right, True, True), exact)

        y = torch.randn(batch, tokens, width, device=device).half()
        exact = x.double() + gate.double() * y.double()
        yield compare(f"gate {label}", ops.gate_residual(x, gate, y), x + gate * y, exact)

        heads = max(h for h in (1, 2, 4, 8, 16) if width % h == 0)
        qkv = torch.randn(batch, tokens, 3 * width + 8, device=device).half()[..., : 3 * width]
        scales = [torch.randn(width // heads, device=device).half() for _ in range(2)]
        exact_parts = reference.qk_norm_ref(qkv.float(), *scales, heads)
        for which, ours, good in zip("qk", ops.qk_norm(qkv, *scales, heads), exact_parts,
                                     strict=True):  # fmt: skip
            yield compare(f"{which} norm {label}", ours, good.half(), good)


def quantized(name: str, codes: Tensor, steps: Tensor, exact: Tensor) -> Check:
    """Checks that codes times steps are within half a step of the float rows (0.51)."""
    broken = ~torch.isfinite(exact).all(-1, keepdim=True)
    if not torch.equal(steps.isnan(), broken) or codes[broken.squeeze(-1)].any():
        return Check(name, float("nan"), 0.0)
    step = exact.abs().amax(-1, keepdim=True) / 127
    off = (codes.double() * steps.double() - exact.double()) / step.clamp(min=1e-30)
    return Check(name, float(off[~broken.squeeze(-1)].abs().max().item()), 0.51)
