"""Chooses the kernel of a packed linear and logs it once per layer class and device.

On GPUs the Triton operators run. The plain PyTorch reference serves calls that need gradients and,
with a warning, layouts without a kernel: there is no silent fallback. On CPUs the int8 engine's
linears (`runtime/engines/cpu_linear.py`) call `cpu.py` directly; all others use the reference here.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from vitapack.kernels.linear import gemm_table, reference
from vitapack.kernels.linear.epilogue import Epilogue
from vitapack.kernels.linear.layouts import WeightLayout
from vitapack.kernels.linear.support import announce, gpu_kernels, gpu_support
from vitapack.kernels.linear.weights import PackedWeight

REFERENCE = "the reference: gradients are needed, or there is no kernel"


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, compute: str) -> Tensor:
    """Applies a packed weight (N, K) to x (..., K): (..., N). `compute` is "a16" or "a8"."""
    layer = f"{weight.layout.name} {compute} linear"
    if _on_gpu(layer, weight.layout, x):
        return _linear_gpu(x, weight, bias, compute)
    announce(layer, x.device.type, "plain PyTorch", REFERENCE)
    run = reference.linear_w8a8_ref if compute == "a8" else reference.linear_a16_ref
    return run(x, weight, bias)


def _on_gpu(layer: str, layout: WeightLayout, x: Tensor) -> bool:
    """Whether the Triton operators serve this call: on CUDA, without gradients."""
    if x.device.type != "cuda" or (torch.is_grad_enabled() and x.requires_grad):
        return False
    if "triton" in layout.kernels:
        return gpu_kernels(layer, x.device)
    why = f"no Triton kernel reads layout {layout.id}; slow"
    announce(layer, str(x.device), "plain PyTorch", why, logging.WARNING)
    return False


def announce_gpu(layout: WeightLayout, compute: str, x: Tensor) -> None:
    """Logs the kernel of packed linears in one layout at the row count of x (..., K)."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return
    op = gemm_table.op_name(layout, compute)
    rows = gemm_table.bucket(x.shape[:-1].numel())
    path = _gpu_path(op, x.device, rows, x.dtype)
    announce(f"{layout.name} {compute} linear", str(x.device), *path)


@functools.cache
def _gpu_path(op: str, device: torch.device, rows: int, dtype: torch.dtype) -> tuple[str, str]:
    """(kernel, reason) for the log; tuned shapes may differ."""
    choice = gemm_table.default_choice(op, gemm_table.arch_of(device), rows)
    assert choice is not None
    why = f"{choice.source}, about {rows} rows; {gpu_support(device)[1]}; compiled, not timed"
    if op.endswith("a16") and dtype != torch.float16:
        return "expand to scratch + cuBLAS", f"activations are {dtype}, the kernel takes float16"
    how = {"fused": f"Triton {op}", "dense": "expand to scratch + cuBLAS"}
    return how.get(choice.how, "expand to int8 + Triton w8a8"), why


def _linear_gpu(x: Tensor, weight: PackedWeight, bias: Tensor | None, compute: str) -> Tensor:
    """`linear` by the Triton operators."""
    from vitapack.kernels.linear import gpu_ops

    announce_gpu(weight.layout, compute, x)
    flat = x.reshape(-1, x.shape[-1])
    if compute == "a8":
        y, sx = gpu_ops.ops.join(None, flat, False, True)
        sx = sx.flatten()
    else:
        y, sx = flat if flat.stride(-1) == 1 else flat.contiguous(), None
    return gpu_ops.gemm(y, sx, weight, Epilogue(bias), x.dtype).unflatten(0, x.shape[:-1])
