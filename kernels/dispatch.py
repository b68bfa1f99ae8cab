"""Which kernel runs a packed linear, said once per layer class and device: never a silent fallback.

Today there is one path, the plain-PyTorch reference; kernels of `cpu.py` and `triton_gemm.py` are
chosen here when they exist, and nowhere else.
"""

from __future__ import annotations

import functools
import logging

from torch import Tensor

from vitapack.kernels import reference

log = logging.getLogger("vitapack.kernels")


@functools.cache  # one line per distinct (layer class, device, path, reason)
def announce(layer: str, device: str, path: str, why: str) -> None:
    """Logs which path serves a layer class, the first time it is used."""
    log.info("%s on %s: %s (%s)", layer, device, path, why)


def linear_int8(x: Tensor, q8: Tensor, scale: Tensor, bias: Tensor | None, compute: str) -> Tensor:
    """x (..., K) through an 8-bit weight (N, K); `compute` is "a16" or "a8"."""
    announce(f"int8 {compute} linear", x.device.type, "plain PyTorch", "the only path built so far")
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
    announce(f"int4 {compute} linear", x.device.type, "plain PyTorch", "the only path built so far")
    w8 = reference.expand_int4(q4, group, group_size, x.shape[-1])
    run = reference.linear_w8a8_ref if compute == "a8" else reference.linear_a16_ref
    return run(x, w8, scale, bias)
