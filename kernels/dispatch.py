"""Which kernel runs a packed linear, said once per layer class and device: never a silent fallback.

On CPUs that is the int8 engine of `cpu.py` in the instruction set it found; the plain-PyTorch
reference serves what has no kernel, with a warning, and whoever needs gradients.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels import reference

if TYPE_CHECKING:
    from vitapack.kernels.cpu import Panels

log = logging.getLogger("vitapack.kernels")

REFERENCE = "the reference: gradients are needed, or there is no kernel"


@functools.cache  # one line per distinct (layer class, device, path, reason)
def announce(layer: str, device: str, path: str, why: str, level: int = logging.INFO) -> None:
    """Logs which path serves a layer class, the first time it is used."""
    if torch.compiler.is_compiling():  # a log call would break the graph in two
        return
    log.log(level, "%s on %s: %s (%s)", layer, device, path, why)


@functools.cache
def gpu_support(device: torch.device) -> tuple[bool, str]:
    """Whether the Triton kernels serve a CUDA device, and why (not)."""
    from vitapack.kernels import tuning

    arch = tuning.arch_of(device)
    try:
        import triton
    except ImportError:
        return False, "triton is not installed: pip install triton"
    if tuning.table_arch(arch) is None:
        return False, f"no kernels for sm_{arch}, only for {', '.join(map(str, tuning.ARCHS))}"
    if fault := _fault(device):
        return False, f"triton {triton.__version__} does not work here: {fault}"
    return True, f"sm_{arch}, triton {triton.__version__}"


def _fault(device: torch.device) -> str:
    """What keeps a first small kernel from running, in one line; nothing if it runs.

    Triton builds its launcher with the machine's C compiler and Python's headers, and its binaries
    with a ptxas that the driver may be too old for: all that shows at the first launch.
    """
    from vitapack.kernels.gpu_ops import ops

    try:
        codes, _ = ops.join(None, torch.ones(1, 16, device=device), False, True)
        return "" if codes.eq(127).all() else "a first kernel gave wrong numbers"
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def gpu_kernels(layer: str, device: torch.device) -> bool:
    """Whether the Triton kernels serve `layer` on a CUDA device; warns where they do not."""
    if torch.compiler.is_compiling():  # the operators refuse unknown hardware by themselves
        return True
    ready, why = gpu_support(device)
    if not ready:
        announce(layer, str(device), "plain PyTorch", f"{why}; slow", logging.WARNING)
    return ready


def announce_gpu(bits: int, compute: str, x: Tensor) -> None:
    """Says which kernel serves packed linears of one kind at x (..., K)'s number of rows."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return
    from vitapack.kernels import tuning

    op = tuning.op_name(bits == 4, compute == "a8")
    rows = tuning.bucket(x.shape[:-1].numel())
    announce(f"int{bits} {compute} linear", str(x.device), *_gpu_path(op, x.device, rows, x.dtype))


@functools.cache
def _gpu_path(op: str, device: torch.device, rows: int, dtype: torch.dtype) -> tuple[str, str]:
    """(kernel, why) for the log; single shapes that were tuned may differ."""
    from vitapack.kernels import tuning

    choice = tuning.default_choice(op, tuning.arch_of(device), rows)
    assert choice is not None
    why = f"{choice.source}, about {rows} rows; {gpu_support(device)[1]}; compiled, not timed"
    if op.endswith("a16") and dtype != torch.float16:
        return "expand to scratch + cuBLAS", f"activations are {dtype}, the kernel takes float16"
    how = {"fused": f"Triton {op}", "dense": "expand to scratch + cuBLAS"}
    return how.get(choice.how, "expand to int8 + Triton w8a8"), why


def attention(q: Tensor, k: Tensor, v: Tensor, int8: bool, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (B, H, n, d) on a GPU, `bias` (1, n) of the keys.

    torch's SDPA, or SageAttention's int8 kernels where they are installed, `int8` arithmetic is
    what the model computes in and there is no bias; VITAPACK_ATTENTION=sdpa keeps torch's. Of the
    latter's kernels most run on the device's default stream whatever torch's is (its open pull
    request 380), so other streams, and with them CUDA graphs, have SDPA.
    """
    if bias is not None:
        announce("attention with a bias", str(q.device), "torch SDPA", "its kernels take one")
        return F.scaled_dot_product_attention(q, k, v, bias)
    traced = torch.compiler.is_compiling()  # which cannot look for it, nor take its kernels
    ready = int8 and q.device.type == "cuda" and not traced and _sage()
    ready = ready and q.shape[-1] in (64, 96, 128)
    if ready and torch.cuda.current_stream(q.device) == torch.cuda.default_stream(q.device):
        announce("attention", str(q.device), "SageAttention", "installed, and activations are int8")
        return _sage()(q, k, v, tensor_layout="HND", is_causal=False)
    why = "SageAttention does not serve it" if int8 else "the model computes in 16 bits"
    announce("attention", str(q.device), "torch SDPA", why)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def _sage() -> Any:
    """SageAttention's function, or None."""
    if os.environ.get("VITAPACK_ATTENTION", "auto") == "sdpa":
        return None
    try:
        from sageattention import sageattn
    except ImportError:
        return None
    return sageattn


def _linear_gpu(
    x: Tensor, codes: Tensor, group: Tensor | None, group_size: int, scale: Tensor,
    bias: Tensor | None, compute: str,
) -> Tensor:  # fmt: skip
    """x (..., K) through a packed weight by the Triton operators."""
    from vitapack.kernels.gpu_ops import ops

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


def cpu_engine(layer: str) -> bool:
    """Whether the int8 engine serves `layer` on this CPU; says so, or warns that it does not."""
    from vitapack.kernels import cpu

    if not cpu.available():
        why = "vitapack._C is not built: pip install -e . builds it; expect a tenth of the speed"
        announce(layer, "cpu", "plain PyTorch", why, logging.WARNING)
        return False
    name = cpu.instruction_set()
    if name == "portable":
        why = "this CPU has neither AVX2 nor VNNI: correct, but slow"
        announce(layer, "cpu", "int8 engine, portable C++", why, logging.WARNING)
    else:
        best = name == cpu.instruction_sets()[0]
        why = "the best that this CPU has" if best else f"{cpu.VARIABLE} or the caller asks for it"
        announce(layer, "cpu", f"int8 engine, {name}", why)
    return True


def linear_panels(x: Tensor, panels: Panels, compute: str) -> Tensor:
    """x (..., K) on the CPU through a weight in the engine's panels."""
    from vitapack.kernels import cpu

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
