"""Which tensors a packed network consists of: names, dtypes and shapes from the architecture alone.

Both halves rest on this table: the compressor lays a file out with it before it computes a tensor,
and the reader demands exactly it. Torch-free. Names are the canonical ones of `runtime/dit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitapack.runtime.layermap import KIND_OF, LayerMap

DOUBLE_SINGLE, FLOW = "double-single-dit", "flow-transformer"  # runtime/dit.py, runtime/trellis.py
BLOCK_KINDS = {DOUBLE_SINGLE: ("double", "single"), FLOW: ("block",)}

# Layout ids, one per linear. A change of byte order gets a new id, never a new meaning.
W16, W8 = "w16-v1", "w8-c-v1"
W4 = {group: f"w4-b64-g{group}-v1" for group in (32, 64, 128)}
BITS_OF = {W16: 16, W8: 8, **{layout: 4 for layout in W4.values()}}
GROUP_OF = {layout: group for group, layout in W4.items()}


@dataclass(frozen=True)
class Linear:
    """One linear of the network: its true sizes and its part in it."""

    out: int
    inputs: int
    bias: bool
    role: str  # "block", "modulation", "time" or "edge" (in and out of the network)


@dataclass(frozen=True)
class SizeTable:
    """Bytes by part; the parts add up to the whole file."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def dit(self) -> int:
        """Bytes of the network alone: without shape decoder, conditioner and header."""
        return self.total - sum(
            self.parts.get(part, 0) for part in ("shape decoder", "conditioner", "header")
        )

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.parts, "dit": self.dit, "total": self.total}

    def describe(self) -> str:
        """A table of MiB by part, empty parts left out."""
        rows = [(part, size) for part, size in self.parts.items() if size]
        rows += [("network", self.dit), ("file", self.total)]
        return "\n".join(f"{part:22}{size / 2**20:10.3f} MiB{size:15,} B" for part, size in rows)


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


def weight_tensors(name: str, linear: Linear, layout: str, rest: str) -> dict[str, Any]:
    """The tensors that hold one linear's weight: name -> (dtype, shape)."""
    n, k = linear.out, linear.inputs
    if layout == W16:
        return {f"{name}.weight": (rest, (n, k))}
    if layout == W8:
        codes = {f"{name}.weight.q8": ("I8", (n, k))}
    else:
        padded, group = -(-k // 64) * 64, GROUP_OF[layout]
        codes = {
            f"{name}.weight.q4": ("U8", (n, padded // 2)),
            f"{name}.weight.group": ("U8", (n, -(-padded // group))),
        }
    return codes | {f"{name}.weight.scale": ("F32", (n,))}


def model_tensors(
    network: Mapping[str, Any],
    linears: Mapping[str, str],
    rest: str,
    modulation: Mapping[str, Any],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The exact tensors of the DiT part: name in the file -> (dtype, shape)."""
    tables = modulation["kind"] in ("table", "both")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, linear in network_linears(network).items():
        if linear.role == "modulation" and tables:
            shape = (modulation["nodes"], linear.out)
            tensors[f"{name}.table"] = (modulation["dtype"], shape)
        if linear.role in ("modulation", "time") and modulation["kind"] == "table":
            continue
        tensors |= weight_tensors(name, linear, linears.get(name, W16), rest)
        if linear.bias:
            tensors[f"{name}.bias"] = (rest, (linear.out,))
    for name, norm in network_norms(network).items():
        tensors[name] = (rest, norm)
    tensors = {f"model.{name}": spec for name, spec in tensors.items()}
    if tables:
        tensors["modulation.t"] = ("F64", (modulation["nodes"],))
    return tensors


def plan_linears(
    network: Mapping[str, Any], layer_map: LayerMap, modulation: str
) -> dict[str, str]:
    """The layout of every block linear, and of the modulation linears whose weights are kept."""
    layouts = {16: W16, 8: W8, 4: W4[layer_map.group]}
    plan = {}
    for name, linear in network_linears(network).items():
        if linear.role == "block":
            kind, index = name.split(".")[:2]
            plan[name] = layouts[layer_map.bits(KIND_OF[kind], int(index))]
        elif linear.role == "modulation" and modulation != "table":
            plan[name] = W16 if modulation == "kept" else W8
    return plan


def size_table(sizes: Mapping[str, int], linears: Mapping[str, str], header: int) -> SizeTable:
    """Sums bytes per part; `sizes` by name in the file, `header` the bytes before the data."""
    parts = dict.fromkeys(
        ("8-bit weights", "4-bit weights", "16-bit weights", "modulation tables",
         "modulation weights", "biases, norms, edges", "shape decoder", "conditioner"), 0,
    )  # fmt: skip
    for name, nbytes in sizes.items():
        parts[_part(name, linears)] += nbytes
    return SizeTable(parts | {"header": header})


def _part(name: str, linears: Mapping[str, str]) -> str:
    if name.startswith("vae."):
        return "shape decoder"
    if name.startswith("conditioner."):
        return "conditioner"
    if name == "modulation.t" or name.endswith(".table"):
        return "modulation tables"
    inner = name.removeprefix("model.")
    owner, dot, _ = inner.partition(".weight")
    owner = owner if dot else inner.removesuffix(".bias")
    if owner.startswith(("time_in", "guidance_in")) or owner.endswith(
        ("_mod.lin", ".mod.lin", "modulation.lin", "adaLN_modulation.1")
    ):
        return "modulation weights"
    if dot and owner in linears:
        return f"{BITS_OF[linears[owner]]}-bit weights"
    return "biases, norms, edges"
