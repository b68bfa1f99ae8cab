"""int4 weights with float group scales, with which the packed file's integer ones are compared.

Codes and zero points are the packed file's. Only the group scales differ: instead of the channel
scale times a small integer, the float that fits the original weights best (least squares).
Activations are floats, so the comparison includes the cost of both integer group scales and int8
activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitapack.kernels.linear.weights import UNPACK, unpack_group
from vitapack.runtime.networks.linear import PackedLinear
from vitapack.runtime.pipeline.load import load_dit


def float_group_weight(linear: PackedLinear, weight: Tensor) -> Tensor:
    """A grouped linear's weight (N, K) with float group scales fitted to `weight`."""
    packed, layout = linear.packed(), linear.layout
    if packed.group is None:
        raise ValueError(f"expected a linear with groups, found {layout.name}")
    codes = UNPACK[layout.codes](packed.codes).float()
    rows, padded = codes.shape
    whole = packed.group.shape[1] * layout.group  # the last group may be cut short
    grouped = torch.zeros(2, rows, whole)
    grouped[0, :, :padded] = codes
    grouped[1, :, : linear.in_features] = weight
    steps, wanted = grouped.unflatten(-1, (-1, layout.group))
    steps = steps - unpack_group(packed.group)[1].float()[..., None]
    steps.flatten(1)[:, linear.in_features :] = 0
    fit = (steps * wanted).sum(-1) / steps.square().sum(-1).clamp_min(1e-30)
    return (steps * fit[..., None]).flatten(1)[:, : linear.in_features]


def float_group_dit(packed: Path, original: Path) -> Any:
    """The packed DiT in float32, with float group scales in all linears with groups."""
    module = load_dit(packed, compute="a16")
    source = load_dit(original)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, PackedLinear) and linear.layout.group:
            exact = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
            weight = source.get_submodule(name).weight.detach()
            with torch.no_grad():
                exact.weight.copy_(float_group_weight(linear, weight))
                if linear.bias is not None:
                    exact.bias.copy_(linear.bias)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, exact)
    return module
