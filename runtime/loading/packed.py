"""Loads the network of a packed file.

    dit = load_packed_dit("model.safetensors", device="cpu", compute="a16")

The network is built on the meta device, so nothing is allocated but the packed tensors themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from vitapack.runtime.engines.choose import Execution, choose, network_of
from vitapack.runtime.engines.cpu_linear import linear_for
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.header import PARTS, PackedHeader, read_header
from vitapack.runtime.format.reader import VERIFY_BELOW, TensorReader, verify
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
    """The network of a packed file, in eval mode.

    compute: "a16" (weight-only) or "a8" (int8 activations as well). dtype: of everything that is
    not packed; float32 on CPUs and float16 elsewhere by default. modulation: "table" or "int8"
    where the file holds both (default: the exact tables). verify_content: check the sha256; by
    default up to 256 MiB. Raises FormatError (a UserError) for anything wrong with the file.
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
    """As `load_packed_dit`, with the decision how to compute already made."""
    header = read_header(path)
    chosen = _modulation(header, modulation)
    if verify_content or (verify_content is None and header.size <= VERIFY_BELOW):
        verify(path)
    compute, dtype = execution.compute, execution.dtype
    with torch.device("meta"):
        dit = network_of(header.network, execution).eval()

    with TensorReader(header, execution.device) as reader:
        for name, linear in header.network.linears().items():
            if chosen == "table" and linear.role == "modulation":
                count = linear.out // header.network.hidden
                table = reader.floats(f"model.{name}.table", dtype)
                # In the blocks the table takes the place of the module around the linear.
                replace_module(dit, name.removesuffix(".lin"), ModulationTable(table, count))
            elif (layout := header.layout(name)).packed:
                prefix = f"model.{name}"
                bias = reader.floats(f"{prefix}.bias", dtype) if linear.bias else None
                # Modulation runs once a step on one row: int8 activations would only cost.
                mode = "a16" if linear.role == "modulation" else compute
                # Its tensors are held by nothing else, so the engine's order takes their place.
                weight = reader.weight(f"{prefix}.weight", layout, linear.inputs)
                replace_module(dit, name, linear_for(weight, bias, mode, execution.path))
                del weight
        if chosen == "table":
            nodes = reader.floats("modulation.t", torch.float64)
            if nodes.tolist() != header.nodes():
                raise FormatError(
                    f"{header.path}: tensor 'modulation.t': expected the times of "
                    f"{header.schedules()}, found others"
                )
            guidance = header.modulation["guidance"]
            dit.time_in = TimeNodes(nodes, guidance, header.schedules())
            if header.network.embeds_guidance:
                del dit.guidance_in
        rest = {name: reader.floats(f"model.{name}", dtype) for name in empty(dit)}
    dit.load_state_dict(rest, strict=False, assign=True)
    if left := list(empty(dit)):
        raise AssertionError(f"never loaded: {left}")
    return dit.requires_grad_(False)


def loaded_bytes(header: PackedHeader, dtype: torch.dtype) -> int:
    """Bytes of the network that `load_packed_dit` makes: codes as stored, floats in `dtype`."""
    total = 0
    for name, info in header.tensors.items():
        if not name.startswith(("model.", "modulation.")):
            continue
        fixed = info.dtype in ("I8", "U8", "F64") or name.endswith(".weight.scale")
        items = info.nbytes // (4 if info.dtype == "F32" else 2)
        total += info.nbytes if fixed else items * dtype.itemsize
    return total


def embedded_tensors(
    path: str | os.PathLike[str] | PackedHeader, part: str
) -> dict[str, torch.Tensor]:
    """Tensors of an embedded part ("shape_decoder" or "conditioner"), names without its prefix.

    Raises UserError where the part is only referenced: the message names the file that holds it.
    """
    header = path if isinstance(path, PackedHeader) else read_header(path)
    entry = getattr(header, part)
    if entry["storage"] != "embedded":
        source = entry["source"]
        where = f"it is in {source['name']}" if source else "the file says nothing of one"
        raise UserError(f"{header.path}: the {part.replace('_', ' ')} is not embedded; {where}")
    prefix = f"{PARTS[part]}."
    with TensorReader(header, "cpu") as reader:
        return {
            name.removeprefix(prefix): reader.read(name)
            for name in header.tensors
            if name.startswith(prefix)
        }


def _modulation(header: PackedHeader, wanted: str | None) -> str:
    kind = header.modulation["kind"]
    held = ("table", "int8") if kind == "both" else (kind,)
    if wanted is not None and wanted not in held:
        raise UserError(
            f"{header.path}: holds modulation as {' and '.join(held)}, not as {wanted!r}; "
            "compress it again with --modulation"
        )
    return wanted or held[0]


def empty(dit: torch.nn.Module) -> Iterator[str]:
    """Names of the tensors that are still on the meta device.

    Not from state_dict(): that would make every packed weight that the CPU engine holds again.
    """
    for prefix, module in dit.named_modules():
        fleeting = module._non_persistent_buffers_set
        kept = {name: t for name, t in module._buffers.items() if name not in fleeting}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None and tensor.is_meta:
                yield f"{prefix}.{name}" if prefix else name


def replace_module(dit: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Puts `module` in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(dit.get_submodule(parent), last, module)
