"""Loads the network of a packed file.

    dit = load_packed_dit("model.safetensors", device="cpu", compute="a16")

The network is built on the meta device, so only the packed tensors are allocated.
"""

from __future__ import annotations

import os

import torch

from vitapack.runtime.engines.choose import Execution, choose, network_of
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.header import PackedHeader, read_header
from vitapack.runtime.format.reader import VERIFY_BELOW, verify
from vitapack.runtime.loading.fill import fill, filled_bytes, replace_module
from vitapack.runtime.loading.source import Source, reading
from vitapack.runtime.networks.modulation import ModulationTable, TimeNodes
from vitapack.runtime.networks.network import Network


def load_packed_dit(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    compute: str = "a16",
    *,
    dtype: torch.dtype | None = None,
    modulation: str | None = None,
    verify_content: bool | None = None,
) -> Network:
    """Loads the network of a packed file, in eval mode.

    compute: "a16" (weight-only) or "a8" (int8 activations). dtype: of activations and of tensors
    that are not packed; float32 on CPUs and float16 elsewhere by default. modulation: "table" or
    "int8" for files that hold both (default: the exact tables). verify_content: check the content's
    sha256; by default for files of up to 256 MiB. Raises FormatError for a malformed or damaged
    file, UserError for an unknown device or compute mode, or a modulation that the file lacks.
    """
    execution = choose(device, compute, dtype=dtype)
    return load_packed(path, execution, modulation=modulation, verify_content=verify_content)


def load_packed(
    path: str | os.PathLike[str],
    execution: Execution,
    *,
    modulation: str | None = None,
    verify_content: bool | None = None,
) -> Network:
    """Loads the network of a packed file for a given execution; see `load_packed_dit`."""
    header = read_header(path)
    chosen = _modulation(header, modulation)
    if verify_content or (verify_content is None and header.size <= VERIFY_BELOW):
        verify(path)
    linears = header.network.linears()

    nodes = _nodes(header).to(execution.device) if chosen == "table" else None

    def make() -> Network:
        network = network_of(header.network, execution)
        if nodes is not None:
            _use_tables(network, header, nodes)
        return network

    def compute_of(name: str) -> str:
        # Modulation runs once per step on one row: int8 activations have a cost and no gain.
        return "a16" if linears[name].role == "modulation" else execution.compute

    return fill(make, network_source(header, chosen), execution, compute_of=compute_of)


def network_source(header: PackedHeader, modulation: str) -> Source:
    """The network's tensors under the names of its modules, with modulation as "table" or "int8".

    A modulation table replaces the module around its linear.
    """
    names, layouts = {}, {}
    stored = {name.removeprefix("model."): name for name in header.tensors}
    for name, linear in header.network.linears().items():
        if modulation == "table" and linear.role in ("modulation", "time"):
            if linear.role == "modulation":
                names[f"{name.removesuffix('.lin')}.table"] = f"model.{name}.table"
            continue
        layout = header.layout(name)
        weight = layout.stored(f"{name}.weight", linear.out, linear.inputs)
        names |= {key: stored[key] for key in weight}
        if linear.bias:
            names[f"{name}.bias"] = stored[f"{name}.bias"]
        if layout.packed:
            layouts[name] = layout
    names |= {name: stored[name] for name in header.network.norms()}
    shapes = {new: header.tensors[old].shape for new, old in names.items()}
    read = reading(header)
    return Source(str(header.path), {}, shapes, lambda name: read(names[name]), layouts)


def _nodes(header: PackedHeader) -> torch.Tensor:
    """The times of the modulation tables' rows, (T,) float64."""
    nodes = reading(header)("modulation.t")
    if nodes.tolist() != header.nodes():
        raise FormatError(
            f"{header.path}: tensor 'modulation.t': expected the times of "
            f"{header.schedules()}, found others"
        )
    return nodes


def _use_tables(network: Network, header: PackedHeader, nodes: torch.Tensor) -> None:
    """Replaces the time embedding and the modulation linears by tables, not yet filled."""
    for name, linear in header.network.linears().items():
        if linear.role == "modulation":
            rows = torch.empty(len(nodes), linear.out)
            table = ModulationTable(rows, linear.out // header.network.hidden)
            replace_module(network, name.removesuffix(".lin"), table)
    network.time_in = TimeNodes(nodes, header.modulation["guidance"], header.schedules())
    if header.network.embeds_guidance:
        del network.guidance_in


def loaded_bytes(header: PackedHeader, dtype: torch.dtype) -> int:
    """Bytes of the network that `load_packed` makes by default."""
    nodes = 8 * header.modulation["nodes"]  # float64
    return filled_bytes(network_source(header, _modulation(header, None)), dtype) + nodes


def _modulation(header: PackedHeader, wanted: str | None) -> str:
    kind = header.modulation["kind"]
    held = ("table", "int8") if kind == "both" else (kind,)
    if wanted is not None and wanted not in held:
        raise UserError(
            f"{header.path}: holds modulation as {' and '.join(held)}, not as {wanted!r}; "
            "compress it again with --modulation"
        )
    return wanted or held[0]
