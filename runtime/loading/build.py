"""Makes a module on the meta device and fills it from a stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitapack.runtime.errors import FormatError

Net = TypeVar("Net", bound=nn.Module)


def build(
    make: Callable[[], Net],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: str | torch.device,
) -> Net:
    """A module made on the meta device, filled tensor by tensor; every one must come exactly once.

    FormatError where a value is too large for `dtype`. The caller has checked names and shapes.
    """
    with torch.device("meta"):
        module = make()
    for name, tensor in _converted(tensors, dtype, device):
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    empty = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    assert not empty, empty
    return module.eval()


def _converted(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str | torch.device
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        converted = tensor.to(device=device, dtype=dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            largest = tensor.abs().max().item() if tensor.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                raise FormatError(
                    f"tensor {name} reaches {largest:.3g}, too large for {dtype}; use float32"
                )
        yield name, converted
