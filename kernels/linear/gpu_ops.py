"""The GPU kernels as `torch.library` operators: `torch.ops.vitapack.*`.

They have fake implementations, as torch.compile and CUDA graphs require, and the reference as CPU
kernel, so the same model code runs (and is tested) without a GPU. Importing this file registers
them; `vitapack.kernels.linear.dispatch` does so for the first CUDA tensor.
Defined by plain `Library`: `torch.library.custom_op` adds some 20 us of Python to each of the 400
calls per denoising step, and these operators have no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear import gemm_table, reference, weights
from vitapack.kernels.linear.epilogue import Epilogue, gelu_from
from vitapack.kernels.linear.weights import PackedWeight, int8_weight

_library = torch.library.Library("vitapack", "FRAGMENT")
_DEFINITIONS = (
    "gemm(Tensor x, Tensor? sx, Tensor[] weight, str layout, Tensor? bias, int gelu_from, "
    "Tensor? residual, Tensor? gate, int tokens, ScalarType dtype) -> Tensor",
    "expand(Tensor[] weight, str layout, int in_features, ScalarType dtype) -> Tensor",
    "modulate(Tensor x, Tensor shift, Tensor scale, bool quantize) -> (Tensor, Tensor)",
    "join(Tensor? left, Tensor right, bool gelu, bool quantize) -> (Tensor, Tensor)",
    "gate_residual(Tensor x, Tensor gate, Tensor y) -> Tensor",
    "qk_norm(Tensor qkv, Tensor q_scale, Tensor k_scale, int heads) -> (Tensor, Tensor)",
)
for _definition in _DEFINITIONS:
    _library.define(_definition, tags=torch.Tag.pt2_compliant_tag)

ops = torch.ops.vitapack


def gemm(
    x: Tensor, sx: Tensor | None, weight: PackedWeight, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """Applies a packed weight to x (M, K), float or int8 codes with sx (M,): (M, N) in `dtype`."""
    return ops.gemm(x, sx, *weight.flat(), *epilogue.flat(), dtype)


def expand(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight (N, K): w8 * scale in a float dtype, or w8 itself in int8."""
    return ops.expand(*weight.flat(), weight.in_features, dtype)


# ---- fake implementations: only shapes, for tracing ----


@torch.library.register_fake("vitapack::gemm", lib=_library)
def _(x, sx, weight, *rest):
    return x.new_empty((x.shape[0], weight[0].shape[0]), dtype=rest[-1])


@torch.library.register_fake("vitapack::expand", lib=_library)
def _(weight, layout, in_features, dtype):
    return weight[0].new_empty((weight[0].shape[0], in_features), dtype=dtype)


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


def _reference_expand(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return weights.dequantize(weight).to(dtype)
    w8 = weights.expand(weight)
    return w8.clone() if w8.data_ptr() == weight.codes.data_ptr() else w8


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
    x: Tensor, sx: Tensor | None, weight: PackedWeight, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    layout, gate = weight.layout, epilogue.gate is not None
    op = gemm_table.op_name(layout, "a16" if sx is None else "a8", gate)
    shape = x.shape[0], weight.out_features, x.shape[1]
    choice = gemm_table.choose(op, x.device, *shape, layout.group)
    if choice is None:
        arch = gemm_table.arch_of(x.device)
        raise ValueError(f"no {op} kernel for compute capability sm_{arch}: use the reference")
    return run_choice(choice, x, sx, weight, epilogue, dtype)


def run_choice(
    choice: gemm_table.Choice,
    x: Tensor,
    sx: Tensor | None,
    weight: PackedWeight,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:
    """`gemm` by one of the methods of `gemm_table.hows`."""
    from vitapack.kernels.linear.triton_gemm import gemm as fused

    if sx is None and (choice.how == "dense" or x.dtype != torch.float16):
        # cuBLAS on a scratch of one layer's size, whose memory the next layer reuses.
        bias = None if epilogue.bias is None else epilogue.bias.to(x.dtype)
        y = F.linear(x, expand(weight, x.dtype), bias)
        return _unfused(y.to(dtype), epilogue)
    if choice.how == "apart":
        y = gemm(x, sx, weight, replace(epilogue, residual=None, gate=None), dtype)
        return _unfused(y, replace(epilogue, gelu_from=None))
    if choice.how == "expand":  # to an int8 scratch: the int8 GEMM has the faster loop
        w8 = int8_weight(expand(weight, torch.int8), weight.scale)
        return gemm(x, sx, w8, epilogue, dtype)
    tile = choice.tile
    assert tile is not None
    # A tile holds the gates of two batch entries: shorter entries are gated afterwards.
    gate = epilogue.gate
    apart = gate is not None and gate.shape[0] > 1 and epilogue.tokens < tile.bm
    # GELU spills registers on the largest int8 tiles of sm_90, so it is applied afterwards.
    apart = apart or (sx is not None and epilogue.gelu_from is not None)
    inside = Epilogue(epilogue.bias) if apart else epilogue
    plain = gemm_table.INTERPRETED
    y = fused(x, weight, sx=sx, epilogue=inside, dtype=dtype, tile=tile, plain=plain)
    return _unfused(y, epilogue) if apart else y


def _unfused(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Applies the epilogue without bias to the product of another kernel."""
    y = gelu_from(y, epilogue.gelu_from)
    if epilogue.residual is None or epilogue.gate is None:
        return y
    before, after = (z.unflatten(0, (-1, epilogue.tokens)) for z in (epilogue.residual, y))
    return ops.gate_residual(before, epilogue.gate[:, None], after).flatten(0, 1)


def _triton_expand(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    from vitapack.kernels.linear.triton_gemm import expand

    return expand(weight, dtype, plain=gemm_table.INTERPRETED)


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


# ---- registration: only here are a weight and an epilogue lists of arguments ----


def _gemm_operator(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of `gemm` with the operator's arguments."""

    def operator(x: Tensor, sx: Tensor | None, tensors: Sequence[Tensor], layout: str, *rest: Any):
        weight = PackedWeight.unflat(tensors, layout, x.shape[1])
        return kernel(x, sx, weight, Epilogue.unflat(*rest[:-1]), rest[-1])

    return operator


def _expand_operator(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of `expand` with the operator's arguments."""

    def operator(tensors: Sequence[Tensor], layout: str, in_features: int, dtype: torch.dtype):
        return kernel(PackedWeight.unflat(tensors, layout, in_features), dtype)

    return operator


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gemm": (_gemm_operator(_triton_gemm), _gemm_operator(reference.gemm_ref)),
    "expand": (_expand_operator(_triton_expand), _expand_operator(_reference_expand)),
    "modulate": (_triton_modulate, _reference_modulate),
    "join": (_triton_join, _reference_join),
    "gate_residual": (_triton_gate_residual, _reference_gate_residual),
    "qk_norm": (_triton_qk_norm, _reference_qk_norm),
}


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the tensors' device current, since Triton launches on the current device."""

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        tensor = next(
            leaf
            for argument in arguments
            for leaf in (argument if isinstance(argument, list) else (argument,))
            if isinstance(leaf, Tensor)
        )
        with torch.cuda.device_of(tensor):
            return kernel(*arguments)

    return run


for _name, (_gpu, _cpu) in _KERNELS.items():
    _library.impl(_name, _on_its_device(_gpu), "CUDA")
    # Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors too, without inline PTX.
    _library.impl(_name, _gpu if gemm_table.INTERPRETED else _cpu, "CPU")
