"""PackedLinear: a linear whose weight stays packed in memory, called on x like nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.kernels.linear import dispatch
from vitapack.kernels.linear.weights import PackedWeight
from vitapack.runtime.choices import COMPUTES


class PackedLinear(nn.Module):
    """y = x W^T + b with a packed W, by Triton kernels on GPUs, else in plain PyTorch.

    The buffers are the tensors of the packed file, under the names in the weight's layout, and
    `bias`, (N,) in the dtype of the activations. forward has no side effects, so threads may share
    a module. On the path "cpu-int8" the loader makes engines/cpu_linear.py's CpuLinear instead.
    """

    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None, compute: str = "a16") -> None:
        super().__init__()
        if compute not in COMPUTES:
            raise ValueError(f"compute {compute!r}: expected one of {', '.join(COMPUTES)}")
        self.layout, self.compute = weight.checked().layout, compute
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.hold(weight, bias)

    def hold(self, weight: PackedWeight, bias: Tensor | None) -> None:
        """Stores weight and bias; subclasses choose how."""
        for name in self.layout.names:
            self.register_buffer(name, weight.tensors[name])
        self.register_buffer("bias", bias)

    def packed(self) -> PackedWeight:
        """The weight in its layout."""
        tensors = {name: getattr(self, name) for name in self.layout.names}
        return PackedWeight(self.layout, tensors, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N) in x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} input features, found {x.shape[-1]}")
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return dispatch.linear(x, self.packed(), bias, self.compute)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        # module.half() must not change the scales: 1e-5 and less is common, and denormal in fp16.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {self.layout.name}, "
            f"bias={self.bias is not None}, compute={self.compute}"
        )
