"""Networks beside the DiT: where their tensors come from, and that they come only when needed.

source = checkpoint.component("conditioner")        # or packed_part(header, "conditioner", None)
encoder = Part(lambda: ..., source.nbytes)
encoder()                                           # loads it the first time
encoder.free()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from vitapack.kernels.linear import cpu, reference
from vitapack.kernels.linear.layouts import W8
from vitapack.kernels.linear.weights import int8_weight
from vitapack.runtime.engines.choose import choose
from vitapack.runtime.engines.cpu_linear import linear_for
from vitapack.runtime.errors import UserError
from vitapack.runtime.loading.packed import empty, replace_module
from vitapack.runtime.loading.source import Source

if TYPE_CHECKING:  # families build their parts with this module
    pass

Net = TypeVar("Net", bound=nn.Module)
Q8, SCALE = ".weight.q8", ".weight.scale"


def fill(
    make: Callable[[], Net],
    source: Source,
    dtype: torch.dtype,
    device: str | torch.device,
    bits: int = 16,
    ignored: tuple[str, ...] = (),
) -> Net:
    """A module made on the meta device and filled tensor by tensor, in eval mode.

    `bits` 8 packs the linears as they come (round to nearest, a scale a row), so that the module in
    `dtype` never exists as a whole; linears that are stored packed stay so in any case.
    UserError where tensors are missing, left over or of another shape.
    """
    with torch.device("meta"):
        module = make()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {n: s for n, s in source.weights().items() if not n.startswith(ignored or ("\0",))}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))
        raise UserError(
            f"{source.where}: the tensors do not fit {type(module).__name__}: {odd[0][0]} "
            f"{list(odd[0][1])} ({len(odd)} differ in all)"
        )
    for name, part in list(module.named_modules()):
        if not isinstance(part, nn.Linear):
            continue
        stored = f"{name}{Q8}" in source.shapes
        if not stored and bits != 8:
            continue
        if stored:
            q8, scale = source.read(f"{name}{Q8}"), source.read(f"{name}{SCALE}")
        else:
            q8, scale = in_8_bits(source.read(f"{name}.weight"))
        bias = None if part.bias is None else source.read(f"{name}.bias").to(device, dtype)
        weight = int8_weight(q8.to(device), scale.to(device))
        replace_module(module, name, linear_for(weight, bias, "a16", choose(device).path))
        del q8, weight  # held by nothing else, so the engine's order takes their place
    for name in list(empty(module)):
        parent, _, leaf = name.rpartition(".")
        value = source.read(name).to(device=device, dtype=dtype)
        owner = module.get_submodule(parent)
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return module.eval().requires_grad_(False)


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 and a scale a row, float32 (N): rows are quantized as tokens are, by
    their largest value. DINOv2 giant takes the CPU engine 0.8 s, plain PyTorch 7.5."""
    if cpu.available() and weight.dtype in cpu.TYPES:
        codes, scale = cpu.quantize_activations(weight)
    else:  # in slices: the float32 copies of a whole one take eight times its packed bytes
        sliced = [reference.quantize_activations(rows) for rows in weight.split(512)]
        codes, scale = (torch.cat(parts) for parts in zip(*sliced, strict=True))
    return codes, scale[:, 0]


def filled_bytes(
    source: Source, dtype: torch.dtype, bits: int, linear: Callable[[str, tuple[int, ...]], bool]
) -> int:
    """Bytes of the module that `fill` makes; `linear(name, shape)`: may it be packed?"""
    total = 0
    for name, shape in source.weights().items():
        count = torch.Size(shape).numel()
        packed = f"{name}.q8" in source.shapes or (bits == 8 and linear(name, shape))
        total += W8.nbytes(*shape) if packed else count * dtype.itemsize
    return total
