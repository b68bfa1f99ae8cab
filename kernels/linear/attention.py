"""Attention on GPUs: torch's SDPA or SageAttention."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitapack.kernels.linear.support import announce

if TYPE_CHECKING:
    pass


def attention(q: Tensor, k: Tensor, v: Tensor, int8: bool, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for (B, H, n, d) on a GPU; `bias` (1, n) is per key.

    Uses SageAttention's int8 kernels if they are installed, the model computes in int8 (`int8`)
    and there is no bias; else torch's SDPA, which VITAPACK_ATTENTION=sdpa enforces. Most
    SageAttention kernels run on the device's default stream regardless of torch's current one (its
    open pull request 380), so other streams, and therefore CUDA graphs, use SDPA.
    """
    if bias is not None:
        announce("attention with a bias", str(q.device), "torch SDPA", "its kernels accept one")
        return F.scaled_dot_product_attention(q, k, v, bias)
    traced = torch.compiler.is_compiling()  # tracing supports neither the import nor the kernels
    ready = int8 and q.device.type == "cuda" and not traced and _sage()
    ready = ready and q.shape[-1] in (64, 96, 128)
    if ready and torch.cuda.current_stream(q.device) == torch.cuda.default_stream(q.device):
        announce("attention", str(q.device), "SageAttention", "installed, and activations are int8")
        return _sage()(q, k, v, tensor_layout="HND", is_causal=False)
    why = "SageAttention does not support it" if int8 else "the model computes in 16 bits"
    announce("attention", str(q.device), "torch SDPA", why)
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def _sage() -> Any:
    """SageAttention's function; None if it is not installed or disabled."""
    if os.environ.get("VITAPACK_ATTENTION", "auto") == "sdpa":
        return None
    try:
        from sageattention import sageattn
    except ImportError:
        return None
    return sageattn
