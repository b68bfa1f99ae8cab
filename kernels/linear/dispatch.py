"""Which kernel runs a packed linear, said once per layer class and device: never a silent fallback.

On CPUs that is the int8 engine of `cpu.py` in the instruction set it found; the plain-PyTorch
reference serves what has no kernel, with a warning, and whoever needs gradients.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitapack.kernels.linear import reference
from vitapack.kernels.linear.support import announce, gpu_kernels, gpu_support

if TYPE_CHECKING:
    from vitapack.kernels.linear.cpu import Panels


REFERENCE = "the reference: gradients are needed, or there is no kernel"


def announce_gpu(bits: int, compute: str, x: Tensor) -> None:
    """Says which kernel serves packed linears of one kind at x (..., K)'s number of rows."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return
    from vitapack.kernels.linear import gemm_table

    op = gemm_table.op_name(bits == 4, compute == "a8")
    rows = gemm_table.bucket(x.shape[:-1].numel())
    announce(f"int{bits} {compute} linear", str(x.device), *_gpu_path(op, x.device, rows, x.dtype))


@functools.cache
def _gpu_path(op: str, device: torch.device, rows: int, dtype: torch.dtype) -> tuple[str, str]:
    """(kernel, why) for the log; single shapes that were tuned may differ."""
    from vitapack.kernels.linear import gemm_table

    choice = gemm_table.default_choice(op, gemm_table.arch_of(device), rows)
    assert choice is not None
    why = f"{choice.source}, about {rows} rows; {gpu_support(device)[1]}; compiled, not timed"
    if op.endswith("a16") and dtype != torch.float16:
        return "expand to scratch + cuBLAS", f"activations are {dtype}, the kernel takes float16"
    how = {"fused": f"Triton {op}", "dense": "expand to scratch + cuBLAS"}
    return how.get(choice.how, "expand to int8 + Triton w8a8"), why


def _linear_gpu(
    x: Tensor, codes: Tensor, group: Tensor | None, group_size: int, scale: Tensor,
    bias: Tensor | None, compute: str,
) -> Tensor:  # fmt: skip
    """x (..., K) through a packed weight by the Triton operators."""
    from vitapack.kernels.linear.gpu_ops import ops

    bits = 8 if group is None else 4
    announce_gpu(bits, compute, x)
    flat = x.reshape(-1, x.shape[-1])
    if compute == "a8":
        y, sx = ops.join(None, flat, False, True)
        sx = sx.flatten()
    else:
        y, sx = flat if flat.stride(-1) == 1 else flat.contiguous(), None
    out = ops.gemm(y, sx, codes, group, group_size, scale, bias, -1, None, None, 1, x.dtype)
    return out.unflatten(0, x.shape[:-1])


def _on_gpu(layer: str, x: Tensor) -> bool:
    """Whether the Triton operators take this call: on CUDA, and without gradients."""
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return gpu_kernels(layer, x.device)


def linear_panels(x: Tensor, panels: Panels, compute: str) -> Tensor:
    """x (..., K) on the CPU through a weight in the engine's panels."""
    from vitapack.kernels.linear import cpu

    return cpu.linear_a8(x, panels) if compute == "a8" else cpu.linear_a16(x, panels)


def linear_int8(x: Tensor, q8: Tensor, scale: Tensor, bias: Tensor | None, compute: str) -> Tensor:
    """x (..., K) through an 8-bit weight (N, K); `compute` is "a16" or "a8"."""
    if _on_gpu(f"int8 {compute} linear", x):
        return _linear_gpu(x, q8, None, 0, scale, bias, compute)
    announce(f"int8 {compute} linear", x.device.type, "plain PyTorch", REFERENCE)
    run = reference.linear_w8a8_ref if compute == "a8" else reference.linear_a16_ref
    return run(x, q8, scale, bias)


def linear_int4(
    x: Tensor,
    q4: Tensor,
    group: Tensor,
    group_size: int,
    scale: Tensor,
    bias: Tensor | None,
    compute: str,
) -> Tensor:
    """x (..., K) through a 4-bit weight, expanded exactly to int8 for this one call."""
    if _on_gpu(f"int4 {compute} linear", x):
        return _linear_gpu(x, q4, group, group_size, scale, bias, compute)
    announce(f"int4 {compute} linear", x.device.type, "plain PyTorch", REFERENCE)
    w8 = reference.expand_int4(q4, group, group_size, x.shape[-1])
    run = reference.linear_w8a8_ref if compute == "a8" else reference.linear_a16_ref
    return run(x, w8, scale, bias)
