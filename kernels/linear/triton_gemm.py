"""Triton GEMMs over the packed file's own tensors: int8 or int4 weights, fp16 or int8 activations.

K1 W8A16, K2 W4A16, K3 expand to scratch (for cuBLAS, or for the int8 GEMM), K5 W8A8, K6 W4A8 in one
kernel: `gemm(x, weight, ...)`. The one float scale per output channel is applied in the
epilogue, so the loop is integer weights times fp16 (exact: |w8| <= 127 < 2^11) or int8 x int8.

Triton 3.9 handles int8 registers one byte at a time (`.to(fp16)` costs an I2F per weight), so
inline PTX unpacks four weights at a time. An int4 word of four codes becomes four biased bytes by
ONE integer multiply-add: with q <= 15, s <= 16 and 1 <= s * (q - z) + 128 <= 255 no byte carries
into its neighbour, and q * s + (128 - s * z) over the whole word is exact modulo 2^32.

Compiled, not timed: none of this has run on a GPU. `PLAIN` selects plain Triton operations, which
the interpreter can run. Importing this file needs triton, but not CUDA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.triton_rows import OPTIONS, gelu
from vitapack.kernels.linear.weights import PackedWeight

# Biased bytes u to four fp16: 0x64uu is the fp16 number 1024 + u, u = w + 128, minus 1152.
_BYTES_TO_F16 = """
mov.b32 m, 0x64806480;
prmt.b32 $0, u, 0x64646464, 0x4140;
prmt.b32 $1, u, 0x64646464, 0x4342;
sub.f16x2 $0, $0, m;
sub.f16x2 $1, $1, m; }
"""
W8_TO_F16 = tl.constexpr("{ .reg .b32 u, m;\nxor.b32 u, $2, 0x80808080;" + _BYTES_TO_F16)
# Four low (high) nibbles to fp16: $3 is s, $7 is c = (128 - s * z) * 0x01010101. The comment names
# all eight registers, from which `check_words` tells whether a word belongs to one group.
_GROUP_OF_WORD = "{ .reg .b32 u, m;\n// words $3 $4 $5 $6 ; $7 $8 $9 $10\n"
_SCALE_BYTES = "and.b32 u, u, 0x0f0f0f0f;\nmad.lo.u32 u, u, $3, $7;"
W4_LOW_TO_F16 = tl.constexpr(_GROUP_OF_WORD + "mov.b32 u, $2;\n" + _SCALE_BYTES + _BYTES_TO_F16)
W4_HIGH_TO_F16 = tl.constexpr(_GROUP_OF_WORD + "shr.u32 u, $2, 4;\n" + _SCALE_BYTES + _BYTES_TO_F16)
W4_LOW_TO_S8 = tl.constexpr("""
{ .reg .b32 u;
// words $2 $3 $4 $5 ; $6 $7 $8 $9
and.b32 u, $1, 0x0f0f0f0f;
mad.lo.u32 u, u, $2, $6;
xor.b32 $0, u, 0x80808080; }
""")
W4_HIGH_TO_S8 = tl.constexpr("""
{ .reg .b32 u;
// words $2 $3 $4 $5 ; $6 $7 $8 $9
shr.u32 u, $1, 4;
and.b32 u, u, 0x0f0f0f0f;
mad.lo.u32 u, u, $2, $6;
xor.b32 $0, u, 0x80808080; }
""")
# All asm is declared impure: Triton moves pure asm behind the conversion to the dot's layout, where
# every warp along M repeats it (W4A16, 128x128, sm_80: 12.8 instructions per MMA instead of 3.2).
_WORDS = re.compile(r"// words ([^;\n]+);([^;\n]+)")


class SplitWords(RuntimeError):
    """A compiled kernel that would give wrong numbers, see `check_words`."""


def check_words(ptx: str) -> None:
    """Raises SplitWords if a compiled kernel unpacks one int4 word with two different groups.

    The unpacking PTX reads s and c once for four neighbouring weights. That is correct as long as
    Triton keeps four neighbours of one row in a register, as its layouts do; a version that did
    not would silently give wrong numbers, so every binary is checked before its first use.
    """
    for match in _WORDS.finditer(ptx):
        for names in match.groups():
            if len(set(names.split())) != 1:
                raise SplitWords(
                    f"this Triton ({triton.__version__}) splits an int4 word over rows "
                    f"({match.group(0).strip()}); use the reference path and report it"
                )


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    """Loads values, 0 where not `inside`; without a mask if none is needed, for cp.async."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _scales(g, PLAIN: tl.constexpr):
    """Group bytes as (s, c). c repeats the byte 128 - s * z four times; with PLAIN it is z."""
    g = g.to(tl.int32)
    s = (g >> 4) + 1
    c = g & 15 if PLAIN else (128 - s * (g & 15)) * 0x01010101
    return s, c


@triton.jit
def _unpack4(b, s, c, HIGH: tl.constexpr, A8: tl.constexpr, PLAIN: tl.constexpr):
    """Packed bytes b with (s, c) of their rows to s * (q - z), int8 or fp16, same shape."""
    s, _ = tl.broadcast(s, b)
    c, _ = tl.broadcast(c, b)
    if PLAIN:
        q = b.to(tl.int32) >> 4 if HIGH else b.to(tl.int32) & 15
        wide = s * (q - c)
        return wide.to(tl.int8) if A8 else wide.to(tl.float16)
    elif A8:
        return tl.inline_asm_elementwise(
            W4_HIGH_TO_S8 if HIGH else W4_LOW_TO_S8,
            "=r,r,r,r,r,r,r,r,r,r", [b, s, c], dtype=tl.int8, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            W4_HIGH_TO_F16 if HIGH else W4_LOW_TO_F16,
            "=r,=r,r,r,r,r,r,r,r,r,r", [b, s, c], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def _widen8(b, PLAIN: tl.constexpr):
    """int8 to fp16, exactly."""
    if PLAIN:
        return b.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            W8_TO_F16, "=r,=r,r", [b], dtype=tl.float16, is_pure=False, pack=4
        )


# One binary for every M, without specialised ones for M = 1 or multiples of 16: each takes seconds
# to compile.
@triton.jit(do_not_specialize=["M", "tokens", "gelu_from"])
def gemm_kernel(
    x, sx, w, group, scale, bias, gate, residual, out,
    M, N, K, stride_x, stride_w, stride_group, stride_out, stride_residual, stride_gate, tokens,
    gelu_from,
    A8: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    BIAS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWIZZLE: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """out = [residual + gate *] gelu_from(x W^T * sx * scale + bias). Pointers first, sizes second.

    x (M, K) fp16 or int8 with sx (M,); w int8 (N, K) or uint8 (N, Kp/2) with group (N, groups);
    gate row m // tokens. BK counts inputs; an int4 tile holds BK/2 bytes. The low and high
    nibbles of a byte are 32 inputs apart, so each half is multiplied with its own x tile and
    nothing is interleaved. Rows and columns beyond the end are clamped: computed, never stored.
    """
    pid = tl.program_id(0)
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    # SWIZZLE row blocks process all columns together, so that the weights stay in L2.
    width = SWIZZLE * columns
    first = pid // width * SWIZZLE
    height = min(rows - first, SWIZZLE)
    pid_m = first + pid % width % height
    pid_n = pid % width // height
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_n = pid_n * BN + tl.arange(0, BN)
    in_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns_n = tl.minimum(offs_n, N - 1)
    in_n = columns_n.to(tl.int64)

    acc = tl.zeros((BM, BN), dtype=tl.int32 if A8 else tl.float32)

    if BITS == 4:
        j = tl.arange(0, BK // 2)
        low = j // 32 * 64 + j % 32  # the input of byte j's low nibble
        x_ptrs = x + in_m[:, None] * stride_x + low[None, :]
        w_ptrs = w + in_n[:, None] * stride_w + j[None, :]
        group_ptrs = group + in_n[:, None] * stride_group
        if BK > 64 and GROUP < BK:
            # More than one 64-block, each with its own group bytes.
            group_ptrs = group_ptrs + (j // 32 * 64)[None, :] // GROUP
        # Group bytes are too narrow for cp.async: they are read one iteration ahead instead, and
        # the last iteration reads its own again. Weight rows are padded to 64 inputs, x is not.
        tl.static_assert(EVEN_K or BK == 64)
        g_low = tl.load(group_ptrs)
        g_high = g_low
        if GROUP == 32:
            g_high = tl.load(group_ptrs + 1)
        last = (tl.cdiv(K, BK) - 1) * BK
        for k in range(0, K, BK):
            g_next = group_ptrs + min(k + BK, last) // GROUP
            g_low_next = tl.load(g_next)
            g_high_next = g_low_next
            if GROUP == 32:
                g_high_next = tl.load(g_next + 1)
            b = tl.load(w_ptrs)
            a_low = _load(x_ptrs, low[None, :] < K - k, not EVEN_K)
            a_high = _load(x_ptrs + 32, low[None, :] + 32 < K - k, not EVEN_K)
            s, c = _scales(g_low, PLAIN)
            b_low = _unpack4(b, s, c, False, A8, PLAIN)
            if GROUP == 32:
                s, c = _scales(g_high, PLAIN)
            b_high = _unpack4(b, s, c, True, A8, PLAIN)
            acc = tl.dot(a_low, tl.trans(b_low), acc)
            acc = tl.dot(a_high, tl.trans(b_high), acc)
            x_ptrs += BK
            w_ptrs += BK // 2
            g_low, g_high = g_low_next, g_high_next
    else:
        tl.static_assert(BITS == 8)
        offs_k = tl.arange(0, BK)
        x_ptrs = x + in_m[:, None] * stride_x + offs_k[None, :]
        w_ptrs = w + in_n[:, None] * stride_w + offs_k[None, :]
        for k in range(0, K, BK):
            a = _load(x_ptrs, offs_k[None, :] < K - k, not EVEN_K)
            b = _load(w_ptrs, offs_k[None, :] < K - k, not EVEN_K)
            if not A8:
                b = _widen8(b, PLAIN)
            acc = tl.dot(a, tl.trans(b), acc)
            x_ptrs += BK
            w_ptrs += BK

    y = acc.to(tl.float32)
    if A8:
        y *= tl.load(sx + in_m)[:, None]
    y *= tl.load(scale + in_n)[None, :]
    if BIAS:
        y += tl.load(bias + in_n).to(tl.float32)[None, :]
    if GELU:
        y = tl.where(offs_n[None, :] >= gelu_from, gelu(y), y)
    if GATE:
        # A tile spans at most two batch entries, so two gate vectors suffice; a full tile spills.
        first_batch = pid_m * BM // tokens
        last_batch = tl.minimum(first_batch + 1, (M - 1) // tokens)
        g_first = tl.load(gate + first_batch * stride_gate + columns_n).to(tl.float32)
        g_last = tl.load(gate + last_batch * stride_gate + columns_n).to(tl.float32)
        in_last = offs_m >= last_batch * tokens
        g = tl.where(in_last[:, None], g_last[None, :], g_first[None, :])
        before = tl.load(residual + in_m[:, None] * stride_residual + in_n[None, :]).to(tl.float32)
        y = before + g * y
    tl.store(
        out + in_m[:, None] * stride_out + in_n[None, :],
        y.to(out.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_n[None, :] < N),
    )


@triton.jit
def expand_kernel(
    w, group, scale, out, N, K, stride_w, stride_group, stride_out,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """out (N, K) = w8 (int8, exact), or with SCALED w8 * scale rounded once to a float type."""
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    in_n = tl.minimum(offs_n, N - 1).to(tl.int64)[:, None]
    inside = offs_n[:, None] < N
    if BITS == 4:
        tl.static_assert(BK == 64)
        j = tl.arange(0, 32)[None, :]
        b = tl.load(w + in_n * stride_w + start // 2 + j)
        g = group + in_n * stride_group + start // GROUP
        s, c = _scales(tl.load(g), PLAIN)
        low = _unpack4(b, s, c, False, not SCALED, PLAIN)
        if GROUP == 32:
            s, c = _scales(tl.load(g + 1), PLAIN)
        high = _unpack4(b, s, c, True, not SCALED, PLAIN)
        if SCALED:
            channel = tl.load(scale + in_n)
            low = low.to(tl.float32) * channel
            high = high.to(tl.float32) * channel
        o = out + in_n * stride_out + start + j
        tl.store(o, low.to(out.dtype.element_ty), mask=inside & (start + j < K))
        tl.store(o + 32, high.to(out.dtype.element_ty), mask=inside & (start + 32 + j < K))
    else:
        tl.static_assert(BITS == 8)
        offs_k = start + tl.arange(0, BK)[None, :]
        b = tl.load(w + in_n * stride_w + offs_k, mask=offs_k < K, other=0)
        y = _widen8(b, PLAIN).to(tl.float32) * tl.load(scale + in_n)
        o = out + in_n * stride_out + offs_k
        tl.store(o, y.to(out.dtype.element_ty), mask=inside & (offs_k < K))


@dataclass(frozen=True)
class Tile:
    """One configuration of `gemm_kernel`: tile sizes, warps and pipeline stages."""

    bm: int
    bn: int
    bk: int  # inputs; an int4 tile holds bk / 2 bytes
    warps: int
    stages: int
    swizzle: int = 8

    def fit(self, layout: WeightLayout, k: int) -> Tile:
        """The tile for this K: packed rows are only padded to whole blocks of 64 inputs."""
        return replace(self, bk=layout.block) if layout.block > 1 and k % self.bk else self


def flags(
    layout: WeightLayout, k: int, a8: bool, epilogue: tuple[bool, bool, bool], tile: Tile,
    plain: bool,
) -> dict[str, int | bool]:  # fmt: skip
    """The constexpr arguments of `gemm_kernel`; ahead-of-time compilation uses them as well.

    epilogue: whether there is a bias, GELU, and a gate with its residual.
    """
    tile = tile.fit(layout, k)
    with_bias, with_gelu, with_gate = epilogue
    return {
        "A8": a8, "BITS": layout.bits, "GROUP": layout.group, "EVEN_K": k % tile.bk == 0,
        "BIAS": with_bias, "GELU": with_gelu, "GATE": with_gate,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "SWIZZLE": tile.swizzle,
        "PLAIN": plain,
    }  # fmt: skip


def gemm(
    x: Tensor,
    weight: PackedWeight,
    *,
    sx: Tensor | None = None,
    epilogue: Epilogue | None = None,
    dtype: torch.dtype = torch.float16,
    tile: Tile,
    plain: bool = False,
) -> Tensor:
    """Applies a packed weight to x (M, K): (M, N) in `dtype`.

    fp16 x without sx is weight-only; int8 x needs sx float32 (M,). A gate with a row per batch
    entry needs at least tile.bm tokens per entry. plain: for the interpreter.
    Raises ValueError for dtypes, strides and gates that the kernel does not support.
    """
    e, w, group = epilogue or Epilogue(), weight.codes, weight.group
    (m, k), n, a8 = x.shape, weight.out_features, sx is not None
    if x.dtype != (torch.int8 if a8 else torch.float16):
        raise ValueError(f"x is {x.dtype}: expected int8 with sx, or float16 without")
    for name, tensor in (("x", x), ("w", w), ("group", group), ("residual", e.residual)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m or not n:
        return out
    tile = tile.fit(weight.layout, k)
    if e.gate is not None and e.gate.shape[0] > 1 and e.tokens < tile.bm:
        raise ValueError(f"{e.tokens} rows share a gate: a tile of {tile.bm} rows would need three")
    grid = (triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)
    used = (e.bias is not None, e.gelu_from is not None, e.gate is not None)
    compiled = gemm_kernel[grid](
        x, sx, w, group, weight.scale, e.bias, e.gate, e.residual, out,
        m, n, k, x.stride(0), w.stride(0), 0 if group is None else group.stride(0), n,
        0 if e.residual is None else e.residual.stride(0),
        0 if e.gate is None or e.gate.shape[0] == 1 else e.gate.stride(0), e.tokens,
        e.gelu_from or 0, **flags(weight.layout, k, a8, used, tile, plain),
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    if not plain:
        _check_once(compiled)
    return out


def expand_tile(layout: WeightLayout) -> tuple[int, int]:
    """Rows and inputs per tile of `expand_kernel`."""
    return (64, layout.block) if layout.block > 1 else (16, 256)


def expand(weight: PackedWeight, dtype: torch.dtype = torch.float16, plain: bool = False) -> Tensor:
    """The dense weight (N, K): w8 * scale in a float dtype, or w8 itself in int8."""
    w, group, layout = weight.codes, weight.group, weight.layout
    n, k = weight.out_features, weight.in_features
    out = torch.empty(n, k, dtype=dtype, device=w.device)
    if not n or not k:
        return out
    bn, bk = expand_tile(layout)
    compiled = expand_kernel[(triton.cdiv(n, bn), triton.cdiv(k, bk))](
        w, group, weight.scale, out, n, k, w.stride(0), 0 if group is None else group.stride(0), k,
        BITS=layout.bits, GROUP=layout.group, SCALED=dtype.is_floating_point, BN=bn, BK=bk,
        PLAIN=plain, num_warps=4, **OPTIONS,
    )  # fmt: skip
    if not plain:
        _check_once(compiled)
    return out


_checked: set[str] = set()


def _check_once(compiled: object) -> None:
    """Runs `check_words` on a binary's PTX once: it takes 1 ms, a repeated launch 10 us."""
    key = getattr(compiled, "hash", None)
    if key is None or key in _checked:
        return
    check_words(compiled.asm["ptx"])  # type: ignore[attr-defined]
    _checked.add(key)
