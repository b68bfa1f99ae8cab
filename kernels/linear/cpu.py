"""Python interface of the int8 engine for CPUs: packed weights, linears, attention.

    panels = pack(weight, bias)                       # a PackedWeight
    y = linear_a8(x, panels)                          # int8 activations, dynamic per token
    y = linear_a16(x, panels)                         # weight-only, float32 or bf16 products

The C++ is in csrc/int8; its results agree with `vitapack.kernels.linear.reference`: integer
products bit for bit, the float epilogue to rounding. VITAPACK_ISA names an instruction set to use
instead of the CPU's best one (`instruction_sets()` lists them). The thread count is torch's. Whole
blocks of networks are in `cpu_plans.py`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.reference import MAX_K
from vitapack.kernels.linear.weights import DTYPES, PackedWeight

PANEL = 64  # output channels that are stored together
BLOCK = 64  # inputs are padded to whole blocks
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
VARIABLE = "VITAPACK_ISA"


@functools.cache
def _engine() -> ModuleType | None:
    """The compiled module, set to the chosen instruction set; None if it is not built."""
    try:
        from vitapack import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    if not hasattr(_C, "int8_use"):
        return None  # built from an older checkout
    wanted = os.environ.get(VARIABLE, "")
    try:
        _C.int8_use(wanted)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={wanted!r}: {error}") from None
    return _C


def available() -> bool:
    """Whether the engine is built. Raises ValueError if this CPU lacks the set in VITAPACK_ISA."""
    return _engine() is not None


def built() -> Any:
    """The compiled module. Raises ValueError if it is not built."""
    engine = _engine()
    if engine is None:
        raise ValueError(
            "the compiled part vitapack._C is not built; build it with `pip install -e .` or "
            "`python setup.py build_ext --inplace` in the checkout (needs a C++17 compiler)"
        )
    return engine


def instruction_sets() -> list[str]:
    """Values that VITAPACK_ISA accepts on this CPU, best first."""
    return list(built().int8_sets())


def instruction_set() -> str:
    """The instruction set in use."""
    return str(built().int8_set())


def use_instruction_set(name: str) -> None:
    """Sets the instruction set of this process; "" selects the best. Results agree."""
    built().int8_use(name)


def has_bf16() -> bool:
    """Whether the instruction set in use multiplies bf16 in hardware."""
    return bool(built().int8_has_bf16())


@functools.cache
def _bf16_pays(name: str) -> bool:
    return bool(built().int8_bf16_pays())


def bf16_pays() -> bool:
    """Whether bf16 products are faster than float32, timed once (Emerald Rapids: 2.3x slower)."""
    return _bf16_pays(instruction_set())


@dataclass(frozen=True, eq=False)
class Panels:
    """A packed weight (N, K) with its bias in the engine's layout; owns the tensors that `handle`
    points to. Immutable, so copies and threads share it; pickling stores the file's tensors.

    codes: uint8, the bytes of the file's codes with N and K padded to 64. group: uint8 or
    None. scale, bias float32 and start int32, padded to N rounded up to 64.
    """

    layout: WeightLayout
    rows: int
    columns: int
    codes: Tensor
    group: Tensor | None
    scale: Tensor
    bias: Tensor | None
    start: Tensor
    handle: Any

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.group, self.scale, self.bias, self.start)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def unpacked(self) -> tuple[PackedWeight, Tensor | None]:
        """The tensors as in the packed file, and the bias float32 (N,)."""
        engine, layout = built(), self.layout
        tensors = {"scale": self.scale[: self.rows].clone()}
        specs = layout.tensors(self.rows, self.columns)
        dtype, shape = specs[layout.codes]
        tensors[layout.codes] = torch.empty(shape, dtype=DTYPES[dtype])
        if tensors[layout.codes].numel():
            engine.int8_unpack_rows(
                self.codes.data_ptr(), *shape, _row_bytes(layout, self.columns),
                tensors[layout.codes].data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        if self.group is not None:
            _, shape = specs["group"]
            tensors["group"] = torch.empty(shape, dtype=torch.uint8)
            engine.int8_unpack_group(self.group.data_ptr(), *shape, tensors["group"].data_ptr())
        bias = None if self.bias is None else self.bias[: self.rows].clone()
        return PackedWeight(layout, tensors, self.columns), bias

    def __deepcopy__(self, memo: dict[int, Any]) -> Panels:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return pack, self.unpacked()


def _row_bytes(layout: WeightLayout, k: int) -> int:
    """Bytes per row of codes in panels."""
    return -(-k // BLOCK) * BLOCK * layout.bits // 8


def _padded(values: Tensor | None, rows: int) -> Tensor | None:
    if values is None:
        return None
    out = torch.zeros(rows, dtype=torch.float32)
    out[: values.shape[0]] = values.detach()
    return out


def serves(layout: WeightLayout) -> bool:
    """Whether the engine reads a layout."""
    return "cpu" in layout.kernels


def pack(weight: PackedWeight, bias: Tensor | None = None) -> Panels:
    """Converts a packed weight and its bias, on the CPU, to panels.

    Raises ValueError if the engine cannot read the layout, K is too large or a tensor is wrong.
    """
    engine, threads = built(), torch.get_num_threads()
    layout, codes, k = weight.checked().layout, weight.codes.contiguous(), weight.in_features
    if not serves(layout):
        raise ValueError(f"the CPU engine does not read layout {layout.id} ({layout.name})")
    if k > MAX_K:
        raise ValueError(f"K = {k} could overflow int32 accumulators: at most {MAX_K}")
    if codes.device.type != "cpu":
        raise ValueError(f"expected a weight on cpu, found one on {codes.device}")
    rows, row_bytes = weight.out_features, _row_bytes(layout, k)
    padded = -(-rows // PANEL) * PANEL
    panels = torch.empty(padded * row_bytes, dtype=torch.uint8)
    engine.int8_pack_rows(
        codes.data_ptr(), rows, codes.shape[1], row_bytes, panels.data_ptr(), threads
    )
    group = None
    if weight.group is not None:
        count = weight.group.shape[1]
        group = torch.empty(padded * count, dtype=torch.uint8)
        engine.int8_pack_group(weight.group.contiguous().data_ptr(), rows, count, group.data_ptr())
    scale, wide_bias = _padded(weight.scale, padded), _padded(bias, padded)
    assert scale is not None
    start = torch.zeros(padded, dtype=torch.int32)
    handle = engine.Int8Linear(
        rows, k, layout.bits, layout.group, panels.data_ptr(), _address(group), scale.data_ptr(),
        _address(wide_bias), start.data_ptr(),
    )  # fmt: skip
    engine.int8_find_start(handle, start.data_ptr(), threads)
    return Panels(layout, rows, k, panels, group, scale, wide_bias, start, handle)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows_of(x: Tensor, k: int) -> Tensor:
    """x (..., K) as (M, K) with contiguous rows; copied only if the strides require it."""
    if x.dtype not in TYPES:
        raise TypeError(f"expected float32, bfloat16 or float16, found {x.dtype}")
    if x.device.type != "cpu" or x.shape[-1] != k:
        raise ValueError(f"expected (..., {k}) on cpu, found {tuple(x.shape)} on {x.device}")
    x = x.detach().reshape(-1, k)
    usable = x.stride(1) == 1 or k == 1
    # Overlapping rows and negative strides are not worth a special case.
    return x if usable and (x.shape[0] < 2 or x.stride(0) >= k) else x.contiguous()


def linear_a8(x: Tensor, w: Panels, gelu: bool = False, out: Tensor | None = None) -> Tensor:
    """Linear with int8 activations: x (..., K) to (..., N) in x's dtype, bias included.

    `out`: contiguous tensor for the result, to save the allocation.
    """
    rows = _rows_of(x, w.columns)
    shape = (*x.shape[:-1], w.rows)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    elif tuple(out.shape) != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out: expected contiguous {x.dtype} {shape}, found {tuple(out.shape)}")
    built().int8_linear(
        w.handle, rows.data_ptr(), TYPES[x.dtype], rows.stride(0), rows.shape[0], out.data_ptr(),
        TYPES[x.dtype], w.rows, gelu, torch.get_num_threads(),
    )  # fmt: skip
    return out


def linear_a16(x: Tensor, w: Panels, bf16: bool | None = None) -> Tensor:
    """Weight-only linear: integer weights times float activations, then the channel scale.

    bf16 activations are multiplied in bf16 if that is faster on this CPU (tests may set `bf16`),
    all others in float32 (float16 would lose bits in bf16).
    """
    if bf16 is None:
        bf16 = x.dtype == torch.bfloat16 and bf16_pays()
    rows = _rows_of(x, w.columns)
    out = torch.empty(rows.shape[0], w.rows, dtype=x.dtype)
    built().int8_linear_wide(
        w.handle, rows.data_ptr(), TYPES[x.dtype], rows.stride(0), rows.shape[0], out.data_ptr(),
        TYPES[x.dtype], w.rows, bf16, torch.get_num_threads(),
    )  # fmt: skip
    return out.view(*x.shape[:-1], w.rows)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_activations`: xq int8 (..., K), sx float32 (..., 1)."""
    return _quantize(x, None, None)


def modulate_quantize(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(1 + scale) * LayerNorm(x) + shift of float32 rows (..., K), quantized per row."""
    return _quantize(x.float(), shift.float().contiguous(), scale.float().contiguous())


def _quantize(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    rows = _rows_of(x, k)
    xq = torch.empty(rows.shape[0], k, dtype=torch.int8)
    sx = torch.empty(rows.shape[0], 1, dtype=torch.float32)
    built().int8_quantize(
        rows.data_ptr(), TYPES[x.dtype], rows.stride(0), rows.shape[0], k, _address(shift),
        _address(scale), xq.data_ptr(), sx.data_ptr(),
    )  # fmt: skip
    return xq.view(x.shape), sx.view(*x.shape[:-1], 1)


def accumulate(xq: Tensor, w: Panels) -> Tensor:
    """The exact integer product of xq (M, K) int8 with the weight: int32 (M, N)."""
    xq = xq.contiguous()
    out = torch.empty(xq.shape[0], w.rows, dtype=torch.int32)
    built().int8_accumulate(w.handle, xq.data_ptr(), xq.shape[0], out.data_ptr())
    return out


class Attention:
    """softmax(q k^T / sqrt(d)) v in int8, with memory for one shape.

    If norm weights (d,) are given, q and k are RMS-normalised over d first.
    """

    def __init__(self, batch: int, tokens: int, heads: int, dim: int) -> None:
        if min(batch, tokens, heads, dim) < 1:
            raise ValueError("attention needs at least one token, head and channel")
        self.shape = (batch, tokens, 3, heads, dim)
        self.threads = torch.get_num_threads()
        self.handle = built().Int8Attention(batch, tokens, heads, dim, self.threads)

    def __call__(
        self, qkv: Tensor, query_norm: Tensor | None = None, key_norm: Tensor | None = None
    ) -> Tensor:
        """qkv (B, n, 3, H, d) float32 to (B, n, H * d) float32."""
        if tuple(qkv.shape) != self.shape or qkv.dtype != torch.float32:
            raise ValueError(f"expected float32 {self.shape}, found {qkv.dtype} {tuple(qkv.shape)}")
        batch, tokens, _, heads, dim = self.shape
        norms = [None if n is None else n.float().contiguous() for n in (query_norm, key_norm)]
        qkv = qkv.contiguous()
        out = torch.empty(batch, tokens, heads * dim, dtype=torch.float32)
        self.handle.run(qkv.data_ptr(), out.data_ptr(), *(_address(n) for n in norms))
        return out
