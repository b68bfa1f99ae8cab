"""Which kernels this machine has, logged once per layer class and device."""

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
    """Logs which path serves a layer class, the first time it is used."""
    if torch.compiler.is_compiling():  # a log call would break the graph in two
        return
    log.log(level, "%s on %s: %s (%s)", layer, device, path, why)


@functools.cache
def gpu_support(device: torch.device) -> tuple[bool, str]:
    """Whether the Triton kernels serve a CUDA device, and why (not)."""
    from vitapack.kernels.linear import gemm_table

    arch = gemm_table.arch_of(device)
    try:
        import triton
    except ImportError:
        return False, "triton is not installed: pip install triton"
    if gemm_table.table_arch(arch) is None:
        return False, f"no kernels for sm_{arch}, only for {', '.join(map(str, gemm_table.ARCHS))}"
    if fault := _fault(device):
        return False, f"triton {triton.__version__} does not work here: {fault}"
    return True, f"sm_{arch}, triton {triton.__version__}"


def _fault(device: torch.device) -> str:
    """What keeps a first small kernel from running, in one line; nothing if it runs.

    Triton builds its launcher with the machine's C compiler and Python's headers, and its binaries
    with a ptxas that the driver may be too old for: all that shows at the first launch.
    """
    from vitapack.kernels.linear.gpu_ops import ops

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


def cpu_engine(layer: str) -> bool:
    """Whether the int8 engine serves `layer` on this CPU; says so, or warns that it does not."""
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
        why = "the best that this CPU has" if best else f"{cpu.VARIABLE} or the caller asks for it"
        announce(layer, "cpu", f"int8 engine, {name}", why)
    return True
