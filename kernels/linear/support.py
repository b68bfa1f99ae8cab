"""Finds the kernels that this machine supports; logs them once per layer class and device."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


log = logging.getLogger("vitapack.kernels")


@functools.cache  # one line per distinct (layer class, device, path, reason)
def announce(layer: str, device: str, path: str, why: str, level: int = logging.INFO) -> None:
    """Logs the path of a layer class when it is first used."""
    if torch.compiler.is_compiling():  # a log call would break the graph in two
        return
    log.log(level, "%s on %s: %s (%s)", layer, device, path, why)


@functools.cache
def gpu_support(device: torch.device) -> tuple[bool, str]:
    """Whether the Triton kernels support a CUDA device, and a description or the reason."""
    from vitapack.kernels.linear import gemm_table

    arch = gemm_table.arch_of(device)
    try:
        import triton
    except ImportError:
        return False, "triton is not installed: pip install triton"
    if gemm_table.table_arch(arch) is None:
        return False, f"no kernels for sm_{arch}, only for {', '.join(map(str, gemm_table.ARCHS))}"
    if fault := _fault(device):
        return False, f"triton {triton.__version__} does not work on this machine: {fault}"
    return True, f"sm_{arch}, triton {triton.__version__}"


def _fault(device: torch.device) -> str:
    """The error of a first small kernel in one line; empty if it runs.

    Triton builds its launcher with the machine's C compiler and Python's headers, and its binaries
    with a ptxas that the driver may be too old for; only a launch shows whether all that works.
    """
    from vitapack.kernels.linear.gpu_ops import ops

    try:
        codes, _ = ops.join(None, torch.ones(1, 16, device=device), False, True)
        return "" if codes.eq(127).all() else "a first kernel gave wrong numbers"
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def gpu_kernels(layer: str, device: torch.device) -> bool:
    """Whether the Triton kernels serve `layer` on a CUDA device; warns if they do not."""
    if torch.compiler.is_compiling():  # the operators themselves reject unknown hardware
        return True
    ready, why = gpu_support(device)
    if not ready:
        announce(layer, str(device), "plain PyTorch", f"{why}; slow", logging.WARNING)
    return ready


def cpu_engine(layer: str) -> bool:
    """Whether the int8 engine serves `layer` on this CPU; logs that, or warns if it does not."""
    from vitapack.kernels.linear import cpu

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
        why = "the best that this CPU has" if best else f"set by {cpu.VARIABLE} or the caller"
        announce(layer, "cpu", f"int8 engine, {name}", why)
    return True
