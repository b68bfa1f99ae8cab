"""The tensors of a packed network: names, dtypes and shapes from the architecture alone.

The compressor lays out a file by this table before it computes a tensor, and the reader requires
exactly this table. Torch-free. Names are the canonical ones of
`runtime/networks/dit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitapack.kernels.linear.layouts import LAYOUTS, W8, W16, layout_for
from vitapack.runtime.format.architecture import Architecture
from vitapack.runtime.format.layermap import KIND_OF, LayerMap


def model_tensors(
    network: Architecture,
    linears: Mapping[str, str],
    rest: str,
    modulation: Mapping[str, Any],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The exact tensors of the network: name in the file -> (dtype, shape)."""
    tables = modulation["kind"] in ("table", "both")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, linear in network.linears().items():
        if linear.role == "modulation" and tables:
            shape = (modulation["nodes"], linear.out)
            tensors[f"{name}.table"] = (modulation["dtype"], shape)
        if linear.role in ("modulation", "time") and modulation["kind"] == "table":
            continue
        layout = LAYOUTS[linears.get(name, W16.id)]
        tensors |= layout.stored(f"{name}.weight", linear.out, linear.inputs, rest)
        if linear.bias:
            tensors[f"{name}.bias"] = (rest, (linear.out,))
    for name, norm in network.norms().items():
        tensors[name] = (rest, norm)
    tensors = {f"model.{name}": spec for name, spec in tensors.items()}
    if tables:
        tensors["modulation.t"] = ("F64", (modulation["nodes"],))
    return tensors


def plan_linears(network: Architecture, layer_map: LayerMap, modulation: str) -> dict[str, str]:
    """The layout id of every block linear, and of the modulation linears whose weights are kept.

    This is the only place that turns a block's bits into layouts; all other code reads the layouts.
    """
    plan = {}
    for name, linear in network.linears().items():
        if linear.role == "block":
            kind, index = name.split(".")[:2]
            plan[name] = layout_for(layer_map.bits(KIND_OF[kind], int(index)), layer_map.group).id
        elif linear.role == "modulation" and modulation != "table":
            plan[name] = W16.id if modulation == "kept" else W8.id
    return plan
