"""Fills modules with tensors from any source: checkpoint, packed file or embedded component.

    network = fill(lambda: network_of(config, execution), source, execution)

The module is made on the meta device and filled tensor by tensor, so the peak is the module plus
one tensor. Packed weights stay packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitapack.kernels.linear import cpu, reference
from vitapack.kernels.linear.layouts import W8
from vitapack.kernels.linear.weights import PackedWeight, int8_weight
from vitapack.runtime.engines.choose import Execution
from vitapack.runtime.engines.cpu_linear import linear_for
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.loading.source import Source

Net = TypeVar("Net", bound=nn.Module)


def fill(
    make: Callable[[], Net],
    source: Source,
    execution: Execution,
    *,
    bits: int = 16,
    ignored: tuple[str, ...] = (),
    compute_of: Callable[[str], str] | None = None,
) -> Net:
    """Makes a module and fills it from `source`: in eval mode, without gradients.

    bits: 8 packs the plain linears while they are loaded (round to nearest, one scale per row), so
    that the module never exists as floats. ignored: prefixes of tensors that the module does not
    need. compute_of: compute mode by linear name; weight-only by default. Tensors that `make` has
    put on a real device are left unchanged. Raises UserError if tensors are missing, left over or
    of another shape; FormatError, naming file and tensor, if values are not finite, a scale is not
    above 0, or a value is too large for the dtype.
    """
    with torch.device("meta"):
        module = make()
    _expect_tensors(module, source, ignored)
    device, path = execution.device, execution.path
    for name, linear in list(module.named_modules()):
        layout = source.layouts.get(name)
        if not isinstance(linear, nn.Linear) or not (layout or bits == 8):
            continue
        bias = _floats(source, f"{name}.bias", execution) if linear.bias is not None else None
        if layout:
            tensors = {key: source.read(f"{name}.weight.{key}") for key in layout.names}
            weight = PackedWeight(layout, tensors, linear.in_features).to(device)
            del tensors
        else:
            weight = int8_weight(*in_8_bits(source.read(f"{name}.weight"))).to(device)
        compute = compute_of(name) if compute_of else "a16"
        replace_module(module, name, linear_for(weight, bias, compute, path))
        del weight  # no other reference: the engine's panels replace it in memory
    for name in list(unfilled(module)):
        set_tensor(module, name, _floats(source, name, execution))
    return module.eval().requires_grad_(False)


def _expect_tensors(module: nn.Module, source: Source, ignored: tuple[str, ...]) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name in unfilled(module):
        owner, _, leaf = name.rpartition(".")
        shape = tuple(getattr(module.get_submodule(owner), leaf).shape)
        layout = source.layouts.get(owner) if leaf == "weight" else None
        packed = layout.tensors(*shape) if layout else {}
        wanted |= {f"{name}.{key}": spec[1] for key, spec in packed.items()} or {name: shape}
    found = {n: tuple(s) for n, s in source.shapes.items() if not n.startswith(ignored or ("\0",))}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))
        raise UserError(
            f"{source.label}: the tensors do not fit {type(module).__name__}: {odd[0][0]} "
            f"{list(odd[0][1])} ({len(odd)} differ in all)"
        )


def _floats(source: Source, name: str, execution: Execution) -> Tensor:
    """A stored float tensor in the execution's dtype on its device."""
    tensor, dtype = source.read(name), execution.dtype
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if largest > torch.finfo(dtype).max:
            raise FormatError(
                f"{source.label}: tensor {name!r} reaches {largest:.3g}, too large for {dtype}; "
                "use float32"
            )
    return tensor.to(device=execution.device, dtype=dtype)


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (N, K) to int8 (N, K) with one float32 scale per row (N).

    The scale is the row's largest magnitude over 127. All of DINOv2 giant takes 0.8 s with the CPU
    kernel, 7.5 s in plain PyTorch.
    """
    if cpu.available() and weight.dtype in cpu.TYPES:
        codes, scale = cpu.quantize_activations(weight)
    else:  # in slices: float32 copies of a whole weight take eight times its packed bytes
        sliced = [reference.quantize_activations(rows) for rows in weight.split(512)]
        codes, scale = (torch.cat(pieces) for pieces in zip(*sliced, strict=True))
    return codes, scale[:, 0]


def filled_bytes(
    source: Source,
    dtype: torch.dtype,
    packable: Callable[[str, tuple[int, ...]], bool] | None = None,
) -> int:
    """Bytes of the module that `fill` makes.

    packable(name, shape): whether `bits=8` packs this weight; None for bits=16.
    """
    total = 0
    for name, shape in source.unpacked_shapes().items():
        layout = source.layouts.get(name.removesuffix(".weight"))
        if layout is None and packable is not None and packable(name, shape):
            layout = W8
        count = torch.Size(shape).numel()
        total += layout.nbytes(*shape) if layout else count * dtype.itemsize
    return total


def unfilled(module: nn.Module) -> Iterator[str]:
    """Names of the parameters and persistent buffers that are on the meta device.

    Not from state_dict(), which would unpack every weight that the int8 engine holds.
    """
    for prefix, owner in module.named_modules():
        buffers = {
            name: tensor
            for name, tensor in owner._buffers.items()
            if name not in owner._non_persistent_buffers_set
        }
        for name, tensor in {**owner._parameters, **buffers}.items():
            if tensor is not None and tensor.is_meta:
                yield f"{prefix}.{name}" if prefix else name


def replace_module(module: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the submodule `name` by `new`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Replaces the parameter or buffer `name` by `value`."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
