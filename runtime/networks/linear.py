"""PackedLinear: a linear whose weight stays int8 or int4 in memory, called on x like nn.Linear.

The buffers are the tensors of the packed file, unchanged (docs/format.md); which kernel multiplies
them is decided in `vitapack.kernels.linear.dispatch`. On a CPU the first call puts them into the
order of the int8 engine INSTEAD (`panels`), so that no weight is held twice; whatever looks at the
module from outside (state_dict, moves, copies) sees the file's tensors again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitapack.kernels.linear import dispatch, support
from vitapack.kernels.linear.reference import expand_int4, group_count, padded_k
from vitapack.runtime.choices import COMPUTES

if TYPE_CHECKING:
    from vitapack.kernels.linear.cpu import Panels


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
    panels: Panels | None

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
        self.panels = None
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
        # The engine has no gradients and cannot be traced: both take the reference.
        plain = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        if x.device.type == "cpu" and not plain and (panels := self.prepare()):
            return dispatch.linear_panels(x, panels, self.compute)
        self.restore()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.q8 is not None:
            return dispatch.linear_int8(x, self.q8, self.scale, bias, self.compute)
        assert self.q4 is not None
        assert self.group is not None
        return dispatch.linear_int4(
            x, self.q4, self.group, self.group_size, self.scale, bias, self.compute
        )

    def prepare(self) -> Panels | None:
        """The weight in the CPU engine's order, made once; None where there is no engine."""
        if self.panels is None:
            codes = self.q8 if self.q8 is not None else self.q4
            assert codes is not None
            layer = f"int{self.bits} {self.compute} linear"
            if codes.device.type != "cpu" or not support.cpu_engine(layer):
                return None
            from vitapack.kernels.linear.cpu import pack

            self.panels = pack(
                scale=self.scale,
                bias=self.bias,
                q8=self.q8,
                q4=self.q4,
                group=self.group,
                group_size=self.group_size,
                in_features=self.in_features,
            )
            self.q8 = self.q4 = self.group = None
        return self.panels

    def restore(self) -> None:
        """The file's tensors again, in place of the engine's."""
        if self.panels is not None:
            codes, self.group = self.panels.unpacked()
            self.q8, self.q4 = (codes, None) if self.bits == 8 else (None, codes)
            self.panels = None

    def int8_weight(self) -> Tensor:
        """The exact int8 weight (N, K), expanded if it is stored in 4 bits."""
        if self.panels is not None:
            codes, group = self.panels.unpacked()
            if group is None:
                return codes
            return expand_int4(codes, group, self.group_size, self.in_features)
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
        self.restore()
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.panels is not None:
            codes, group = self.panels.unpacked()
            destination[f"{prefix}q{self.bits}"] = codes
            if group is not None:
                destination[f"{prefix}group"] = group

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles hold the file's tensors
        if self.panels is None:
            return self.__dict__
        codes, group = self.panels.unpacked()
        buffers = dict(self._buffers, group=group) | {f"q{self.bits}": codes}
        return self.__dict__ | {"panels": None, "_buffers": buffers}

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
