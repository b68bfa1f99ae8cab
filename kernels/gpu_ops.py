"""The GPU kernels as `torch.library` operators: `torch.ops.vitapack.*`.

With fake implementations, so that torch.compile and CUDA graphs take them, and with the reference
as their CPU kernel, so that the same model code runs (and is tested) without a GPU. Importing this
file registers them; `vitapack.kernels.dispatch` does so when the first CUDA tensor arrives. Plain
`Library` definitions: `torch.library.custom_op` adds some 20 us of Python to each of the 400 calls
of a step, and these operators have no backward anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels import reference, tuning

_library = torch.library.Library("vitapack", "FRAGMENT")
_DEFINITIONS = (
    "gemm(Tensor x, Tensor? sx, Tensor w, Tensor? group, int group_size, Tensor scale, "
    "Tensor? bias, int gelu_from, Tensor? residual, Tensor? gate, int tokens, ScalarType dtype) "
    "-> Tensor",
    "expand(Tensor w, Tensor? group, int group_size, Tensor scale, int in_features, "
    "ScalarType dtype) -> Tensor",
    "modulate(Tensor x, Tensor shift, Tensor scale, bool quantize) -> (Tensor, Tensor)",
    "join(Tensor? left, Tensor right, bool gelu, bool quantize) -> (Tensor, Tensor)",
    "gate_residual(Tensor x, Tensor gate, Tensor y) -> Tensor",
    "qk_norm(Tensor qkv, Tensor q_scale, Tensor k_scale, int heads) -> (Tensor, Tensor)",
)
for _definition in _DEFINITIONS:
    _library.define(_definition, tags=torch.Tag.pt2_compliant_tag)

ops = torch.ops.vitapack


# ---- shapes alone, for tracing ----


@torch.library.register_fake("vitapack::gemm", lib=_library)
def _(x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype):
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


@torch.library.register_fake("vitapack::expand", lib=_library)
def _(w, group, group_size, scale, in_features, dtype):
    return w.new_empty((w.shape[0], in_features), dtype=dtype)


def _fake_row(x: Tensor, shape: tuple[int, ...], quantize: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(shape, dtype=torch.int8 if quantize else x.dtype)
    return y, x.new_empty((*shape[:-1], 1) if quantize else (0,), dtype=torch.float32)


@torch.library.register_fake("vitapack::modulate", lib=_library)
def _(x, shift, scale, quantize):
    return _fake_row(x, x.shape, quantize)


@torch.library.register_fake("vitapack::join", lib=_library)
def _(left, right, gelu, quantize):
    width = right.shape[-1] + (0 if left is None else left.shape[-1])
    return _fake_row(right, (*right.shape[:-1], width), quantize)


@torch.library.register_fake("vitapack::gate_residual", lib=_library)
def _(x, gate, y):
    return x.new_empty(x.shape)


@torch.library.register_fake("vitapack::qk_norm", lib=_library)
def _(qkv, q_scale, k_scale, heads):
    batch, tokens, width = qkv.shape
    shape = (batch, heads, tokens, width // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


# ---- CPU: the reference ----


@torch.library.impl("vitapack::gemm", "CPU", lib=_library)
def _(x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype):
    k = x.shape[-1]
    w8 = w if group is None else reference.expand_int4(w, group, group_size, k)
    return reference.gemm_ref(x, sx, w8, scale, bias, gelu_from, residual, gate, tokens, dtype)


@torch.library.impl("vitapack::expand", "CPU", lib=_library)
def _(w, group, group_size, scale, in_features, dtype):
    w8 = w if group is None else reference.expand_int4(w, group, group_size, in_features)
    if dtype.is_floating_point:
        return (w8.float() * scale[:, None]).to(dtype)
    return w8.clone() if group is None else w8


@torch.library.impl("vitapack::modulate", "CPU", lib=_library)
def _(x, shift, scale, quantize):
    return _finish(reference.modulate_ref(x, shift, scale), x.dtype, quantize)


@torch.library.impl("vitapack::join", "CPU", lib=_library)
def _(left, right, gelu, quantize):
    return _finish(reference.join_ref(left, right, gelu), right.dtype, quantize)


@torch.library.impl("vitapack::gate_residual", "CPU", lib=_library)
def _(x, gate, y):
    return (x.float() + gate.float() * y.float()).to(x.dtype)


@torch.library.impl("vitapack::qk_norm", "CPU", lib=_library)
def _(qkv, q_scale, k_scale, heads):
    return reference.qk_norm_ref(qkv, q_scale, k_scale, heads)


def _finish(wide: Tensor, dtype: torch.dtype, quantize: bool) -> tuple[Tensor, Tensor]:
    if quantize:
        return reference.quantize_activations(wide)
    return wide.to(dtype, copy=True), wide.new_empty(0, dtype=torch.float32)


# ---- CUDA: Triton ----


@torch.library.impl("vitapack::gemm", "CUDA", lib=_library)
def _(x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype):
    from vitapack.kernels.triton_gemm import Epilogue, gemm

    a8, (m, k), n = sx is not None, x.shape, w.shape[0]
    op = tuning.op_name(w4=group is not None, a8=a8)
    choice = tuning.choose(op, x.device, m, n, k, group_size)
    if choice is None:
        arch = tuning.arch_of(x.device)
        raise ValueError(f"no {op} kernel for compute capability sm_{arch}: use the reference")
    if not a8 and (choice.how == "dense" or x.dtype != torch.float16):
        # cuBLAS on a scratch as large as this one layer, which the next layer's reuses.
        dense = ops.expand(w, group, group_size, scale, k, x.dtype)
        y = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return _unfused(y.to(dtype), gelu_from, residual, gate, tokens)
    if choice.how == "expand":  # int4 to an int8 scratch: the int8 GEMM's loop is the better one
        w, group, group_size = ops.expand(w, group, group_size, scale, k, torch.int8), None, 0
        choice = tuning.choose("w8a8", x.device, m, n, k, 0)
    assert choice is not None
    assert choice.tile is not None
    return gemm(
        x, w, scale, sx=sx, group=group, group_size=group_size, dtype=dtype,
        epilogue=Epilogue(bias, None if gelu_from < 0 else gelu_from, residual, gate, tokens),
        tile=choice.tile, fence=tuning.arch_of(x.device) < 90,
    )  # fmt: skip


def _unfused(
    y: Tensor, gelu_from: int, residual: Tensor | None, gate: Tensor | None, tokens: int
) -> Tensor:
    """The epilogue of a product that cuBLAS made."""
    if gelu_from == 0:
        y = F.gelu(y, approximate="tanh")
    elif gelu_from > 0:
        y = torch.cat([y[:, :gelu_from], F.gelu(y[:, gelu_from:], approximate="tanh")], dim=1)
    if residual is None or gate is None:
        return y
    before, after = (z.unflatten(0, (-1, tokens)) for z in (residual, y))
    return ops.gate_residual(before, gate[:, None], after).flatten(0, 1)


@torch.library.impl("vitapack::expand", "CUDA", lib=_library)
def _(w, group, group_size, scale, in_features, dtype):
    from vitapack.kernels.triton_gemm import expand

    return expand(w, scale, in_features, group=group, group_size=group_size, dtype=dtype)


@torch.library.impl("vitapack::modulate", "CUDA", lib=_library)
def _(x, shift, scale, quantize):
    from vitapack.kernels.triton_fused import modulate

    return modulate(x, shift, scale, quantize)


@torch.library.impl("vitapack::join", "CUDA", lib=_library)
def _(left, right, gelu, quantize):
    from vitapack.kernels.triton_fused import join

    return join(left, right, gelu, quantize)


@torch.library.impl("vitapack::gate_residual", "CUDA", lib=_library)
def _(x, gate, y):
    from vitapack.kernels.triton_fused import gate_residual

    return gate_residual(x, gate, y)


@torch.library.impl("vitapack::qk_norm", "CUDA", lib=_library)
def _(qkv, q_scale, k_scale, heads):
    from vitapack.kernels.triton_fused import qk_norm

    return qk_norm(qkv, q_scale, k_scale, heads)
