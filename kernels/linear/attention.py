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
