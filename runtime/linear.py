"""PackedLinear: a linear whose weight stays int8 or int4 in memory, called on x like nn.Linear.

The buffers are the tensors of the packed file, unchanged (docs/format.md); which kernel multiplies
them is decided in `vitapack.kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.kernels import dispatch
from vitapack.kernels.reference import expand_int4, group_count, padded_k

COMPUTES = ("a16", "a8")  # weight-only, or dynamic per-token int8 activations as well


class PackedLinear(nn.Module):
    """y = x W^T + b with W = scale[n] * w8, w8 stored in 8 bits or in 4 (s * (q - z)).

    int8: q8 int8 (N, K). int4: q4 uint8 (N, Kp/2), group uint8 (N, ceil(Kp/G)). Always: scale
    float32 (N,), bias (N,) or None in the dtype of the activations.
    """

    q8: Tensor | None
    q4: Tensor | None
    group: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        scale: Tensor,
        bias: Tensor | None,
        *,
        q8: Tensor | None = None,
        q4: Tensor | None = None,
        group: Tensor | None = None,
        group_size: int = 0,
        compute: str = "a16",
    ) -> None:
        super().__init__()
        if compute not in COMPUTES:
            raise ValueError(f"compute {compute!r}: expected one of {', '.join(COMPUTES)}")
        rows = scale.shape[0]
        if q8 is not None and q4 is None and group is None:
            _expect("q8", q8, torch.int8, (rows, in_features))
        elif q8 is None and q4 is not None and group is not None:
            _expect("q4", q4, torch.uint8, (rows, padded_k(in_features) // 2))
            _expect("group", group, torch.uint8, (rows, group_count(in_features, group_size)))
        else:
            raise ValueError("a packed linear holds q8, or q4 with its group bytes")
        _expect("scale", scale, torch.float32, (rows,))
        self.in_features = in_features
        self.out_features = rows
        self.bits = 8 if q8 is not None else 4
        self.group_size = group_size
        self.compute = compute
        self.register_buffer("q8", q8)
        self.register_buffer("q4", q4)
        self.register_buffer("group", group)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_tensors(
        cls,
        tensors: dict[str, Tensor],
        name: str,
        in_features: int,
        group_size: int = 0,
        compute: str = "a16",
    ) -> PackedLinear:
        """From `{name}.weight.q8 | .q4 + .group`, `{name}.weight.scale` and maybe `{name}.bias`."""
        return cls(
            in_features,
            tensors[f"{name}.weight.scale"],
            tensors.get(f"{name}.bias"),
            q8=tensors.get(f"{name}.weight.q8"),
            q4=tensors.get(f"{name}.weight.q4"),
            group=tensors.get(f"{name}.weight.group"),
            group_size=group_size,
            compute=compute,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N) in x's dtype."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} input features, found {x.shape[-1]}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.q8 is not None:
            return dispatch.linear_int8(x, self.q8, self.scale, bias, self.compute)
        assert self.q4 is not None
        assert self.group is not None
        return dispatch.linear_int4(
            x, self.q4, self.group, self.group_size, self.scale, bias, self.compute
        )

    def int8_weight(self) -> Tensor:
        """The exact int8 weight (N, K), expanded if it is stored in 4 bits."""
        if self.q8 is not None:
            return self.q8
        assert self.q4 is not None
        assert self.group is not None
        return expand_int4(self.q4, self.group, self.group_size, self.in_features)

    def dequantized(self) -> Tensor:
        """The weight that this layer stands for, float32 (N, K)."""
        return self.int8_weight().float() * self.scale[:, None]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        # module.half() must not touch the scales: 1e-5 and less is common and denormal in fp16.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        width = f"int{self.bits}" + (f" group {self.group_size}" if self.bits == 4 else "")
        return (
            f"{self.in_features} -> {self.out_features}, {width}, "
            f"bias={self.bias is not None}, compute={self.compute}"
        )


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected {dtype} {shape}, found {tensor.dtype} {tuple(tensor.shape)}"
        )
