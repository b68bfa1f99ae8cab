"""The GPU kernels as `torch.library` operators: `torch.ops.vitapack.*`.

With fake implementations, so that torch.compile and CUDA graphs take them, and with the reference
as their CPU kernel, so that the same model code runs (and is tested) without a GPU. Importing this
file registers them; `vitapack.kernels.linear.dispatch` does so when the first CUDA tensor arrives.
Plain `Library` definitions: `torch.library.custom_op` adds some 20 us of Python to each of the 400
calls of a step, and these operators have no backward anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear import gemm_table, reference

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


# ---- the reference ----


def _reference_gemm(
    x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype
):
    k = x.shape[-1]
    w8 = w if group is None else reference.expand_int4(w, group, group_size, k)
    return reference.gemm_ref(x, sx, w8, scale, bias, gelu_from, residual, gate, tokens, dtype)


def _reference_expand(w, group, group_size, scale, in_features, dtype):
    w8 = w if group is None else reference.expand_int4(w, group, group_size, in_features)
    if dtype.is_floating_point:
        return (w8.float() * scale[:, None]).to(dtype)
    return w8.clone() if group is None else w8


def _reference_modulate(x, shift, scale, quantize):
    return _finish(reference.modulate_ref(x, shift, scale), x.dtype, quantize)


def _reference_join(left, right, gelu, quantize):
    return _finish(reference.join_ref(left, right, gelu), right.dtype, quantize)


def _reference_gate_residual(x, gate, y):
    return (x.float() + gate.float() * y.float()).to(x.dtype)


def _reference_qk_norm(qkv, q_scale, k_scale, heads):
    return reference.qk_norm_ref(qkv, q_scale, k_scale, heads)


def _finish(wide: Tensor, dtype: torch.dtype, quantize: bool) -> tuple[Tensor, Tensor]:
    if quantize:
        return reference.quantize_activations(wide)
    return wide.to(dtype, copy=True), wide.new_empty(0, dtype=torch.float32)


# ---- Triton ----


def _triton_gemm(
    x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype
):
    op = gemm_table.op_name(group is not None, sx is not None, gate is not None)
    choice = gemm_table.choose(op, x.device, x.shape[0], w.shape[0], x.shape[1], group_size)
    if choice is None:
        arch = gemm_table.arch_of(x.device)
        raise ValueError(f"no {op} kernel for compute capability sm_{arch}: use the reference")
    return run_choice(
        choice, x, sx, w, group, group_size, scale, bias, gelu_from, residual, gate, tokens, dtype
    )


def run_choice(
    choice: gemm_table.Choice,
    x: Tensor,
    sx: Tensor | None,
    w: Tensor,
    group: Tensor | None,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    gelu_from: int,
    residual: Tensor | None,
    gate: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """`gemm` in one of the ways of `gemm_table.HOWS`; the arguments are the operator's."""
    from vitapack.kernels.linear.triton_gemm import Epilogue, gemm

    if sx is None and (choice.how == "dense" or x.dtype != torch.float16):
        # cuBLAS on a scratch as large as this one layer, which the next layer's reuses.
        dense = ops.expand(w, group, group_size, scale, x.shape[1], x.dtype)
        y = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
        return _unfused(y.to(dtype), gelu_from, residual, gate, tokens)
    if choice.how == "apart":
        y = ops.gemm(x, sx, w, group, group_size, scale, bias, gelu_from, None, None, tokens, dtype)
        return _unfused(y, -1, residual, gate, tokens)
    if choice.how == "expand":  # int4 to an int8 scratch: the int8 GEMM's loop is the better one
        w8 = ops.expand(w, group, group_size, scale, x.shape[1], torch.int8)
        return ops.gemm(x, sx, w8, None, 0, scale, bias, gelu_from, residual, gate, tokens, dtype)
    tile = choice.tile
    assert tile is not None
    # A tile has room for the gates of two batches: shorter ones are gated afterwards.
    apart = gate is not None and gate.shape[0] > 1 and tokens < tile.bm
    # GELU spills the largest int8 tiles of sm_90; there the quantizer of the next linear has it.
    apart = apart or (sx is not None and gelu_from >= 0)
    epilogue = Epilogue(
        bias,
        None if apart or gelu_from < 0 else gelu_from,
        None if apart else residual,
        None if apart else gate,
        tokens,
    )
    y = gemm(
        x, w, scale, sx=sx, group=group, group_size=group_size, dtype=dtype, epilogue=epilogue,
        tile=tile, plain=gemm_table.INTERPRETED,
    )  # fmt: skip
    return _unfused(y, gelu_from, residual, gate, tokens) if apart else y


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


def _triton_expand(w, group, group_size, scale, in_features, dtype):
    from vitapack.kernels.linear.triton_gemm import expand

    return expand(
        w, scale, in_features, group=group, group_size=group_size, dtype=dtype,
        plain=gemm_table.INTERPRETED,
    )  # fmt: skip


def _triton_modulate(x, shift, scale, quantize):
    from vitapack.kernels.linear.triton_rows import modulate

    return modulate(x, shift, scale, quantize)


def _triton_join(left, right, gelu, quantize):
    from vitapack.kernels.linear.triton_rows import join

    return join(left, right, gelu, quantize)


def _triton_gate_residual(x, gate, y):
    from vitapack.kernels.linear.triton_rows import gate_residual

    return gate_residual(x, gate, y)


def _triton_qk_norm(qkv, q_scale, k_scale, heads):
    from vitapack.kernels.linear.triton_rows import qk_norm

    return qk_norm(qkv, q_scale, k_scale, heads)


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gemm": (_triton_gemm, _reference_gemm),
    "expand": (_triton_expand, _reference_expand),
    "modulate": (_triton_modulate, _reference_modulate),
    "join": (_triton_join, _reference_join),
    "gate_residual": (_triton_gate_residual, _reference_gate_residual),
    "qk_norm": (_triton_qk_norm, _reference_qk_norm),
}


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(tensor):
            return kernel(*arguments)

    return run


for _name, (_gpu, _cpu) in _KERNELS.items():
    _library.impl(_name, _on_its_device(_gpu), "CUDA")
    # Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors too, without inline PTX.
    _library.impl(_name, _gpu if gemm_table.INTERPRETED else _cpu, "CPU")
