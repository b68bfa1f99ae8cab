"""Kinds of networks, torch-free: the linears and norms of each, from hyper-parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DOUBLE_SINGLE, FLOW = (
    "double-single-dit",
    "flow-transformer",
)  # runtime/networks/dit.py, runtime/networks/flow.py


BLOCK_KINDS = {DOUBLE_SINGLE: ("double", "single"), FLOW: ("block",)}


@dataclass(frozen=True)
class Linear:
    """One linear of the network: its true sizes and its part in it."""

    out: int
    inputs: int
    bias: bool
    role: str  # "block", "modulation", "time" or "edge" (in and out of the network)


def network_linears(network: Mapping[str, Any]) -> dict[str, Linear]:
    """Every linear of a network by its canonical name, in model order."""
    if network["kind"] == FLOW:
        return _flow_linears(network)
    h, wide = network["hidden"], int(network["hidden"] * network["mlp_ratio"])
    time, qkv_bias = network["time"], network["qkv_bias"]
    linears = {
        "latent_in": Linear(h, network["in_channels"], True, "edge"),
        "cond_in": Linear(h, network["cond_channels"], True, "edge"),
    }
    for name in ("time_in", "guidance_in") if network["guidance_embed"] else ("time_in",):
        linears[f"{name}.in_layer"] = Linear(time["hidden"], time["channels"], True, "time")
        linears[f"{name}.out_layer"] = Linear(h, time["hidden"], True, "time")
    for index in network["double_blocks"]:
        for stream in ("img", "txt"):
            name = f"double_blocks.{index}.{stream}"
            linears[f"{name}_mod.lin"] = Linear(6 * h, h, True, "modulation")
            linears[f"{name}_attn.qkv"] = Linear(3 * h, h, qkv_bias, "block")
            linears[f"{name}_attn.proj"] = Linear(h, h, True, "block")
            linears[f"{name}_mlp.0"] = Linear(wide, h, True, "block")
            linears[f"{name}_mlp.2"] = Linear(h, wide, True, "block")
    for index in network["single_blocks"]:
        name = f"single_blocks.{index}"
        linears[f"{name}.linear1"] = Linear(3 * h + wide, h, True, "block")
        linears[f"{name}.linear2"] = Linear(h, h + wide, True, "block")
        linears[f"{name}.modulation.lin"] = Linear(3 * h, h, True, "modulation")
    linears["final_layer.linear"] = Linear(network["in_channels"], h, True, "edge")
    linears["final_layer.adaLN_modulation.1"] = Linear(2 * h, h, True, "modulation")
    return linears


def _flow_linears(network: Mapping[str, Any]) -> dict[str, Linear]:
    h, wide, time = (
        network["hidden"],
        int(network["hidden"] * network["mlp_ratio"]),
        network["time"],
    )
    token = network["in_channels"] * network["patch"] ** 3
    edges = bool(network["in_channels"])
    linears = {"latent_in": Linear(h, token, True, "edge")} if edges else {}
    linears["time_in.in_layer"] = Linear(time["hidden"], time["channels"], True, "time")
    linears["time_in.out_layer"] = Linear(h, time["hidden"], True, "time")
    for index in network["blocks"]:
        name = f"blocks.{index}"
        linears[f"{name}.mod.lin"] = Linear(6 * h, h, True, "modulation")
        linears[f"{name}.self_attn.qkv"] = Linear(3 * h, h, True, "block")
        linears[f"{name}.self_attn.proj"] = Linear(h, h, True, "block")
        linears[f"{name}.cross_attn.q"] = Linear(h, h, True, "block")
        linears[f"{name}.cross_attn.kv"] = Linear(2 * h, network["cond_channels"], True, "block")
        linears[f"{name}.cross_attn.proj"] = Linear(h, h, True, "block")
        linears[f"{name}.mlp.0"] = Linear(wide, h, True, "block")
        linears[f"{name}.mlp.2"] = Linear(h, wide, True, "block")
    if edges:
        linears["final_layer.linear"] = Linear(token, h, True, "edge")
    return linears


def network_norms(network: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that are no linear's, by name: norms, q/k norm scales as a rule."""
    h, heads = network["hidden"], network["heads"]
    if network["kind"] == FLOW:
        norms: dict[str, tuple[int, ...]] = {}
        for index in network["blocks"]:
            name = f"blocks.{index}"
            for which in ("query", "key"):
                norms[f"{name}.self_attn.norm.{which}_norm.scale"] = (heads, h // heads)
            norms |= {f"{name}.cross_norm.{leaf}": (h,) for leaf in ("weight", "bias")}
        return norms
    streams = [
        f"double_blocks.{index}.{stream}_attn"
        for index in network["double_blocks"]
        for stream in ("img", "txt")
    ]
    streams += [f"single_blocks.{index}" for index in network["single_blocks"]]
    return {
        f"{s}.norm.{which}_norm.scale": (h // heads,) for s in streams for which in ("query", "key")
    }
