"""Describes a packed file in text, from its header alone and without torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitapack.kernels.linear.layouts import W16, WeightLayout
from vitapack.runtime.format.container import one_line
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.format.layermap import BLOCK_FIELDS, KINDS

NOTE = "finetuned"  # key of fine-tuning in the layer map's notes


def describe(header: PackedHeader) -> str:
    """A page of text for `vitapack inspect`; its JSON form is `header.to_json()`."""
    network, modulation, source = header.network, header.modulation, header.source
    lines = [
        f"{header.path}  {_size(header.size)}, packed format 1 by {header.tool}",
        f"sha256      {header.sha256} (of the content; `vitapack inspect` does not compute it)",
        f"model       {header.family} {header.variant}".rstrip(),
        f"source      {source['name']} ({_size(source['bytes'])}, "
        f"sha256 {source['sha256'][:16]}...)",
        f"network     hidden {network.hidden}, {network.heads} heads, "
        f"{network.in_channels} latent and {network.cond_channels} condition channels",
        f"layer map   {header.layer_map.how or 'unnamed'}",
    ]
    for kind in KINDS:
        lines += _blocks(header, kind)
    if note := header.layer_map.notes.get(NOTE):
        lines.append(f"fine-tuned  {describe_finetuning(note)}")
    lines.append(f"quantizer   {header.quantizer}, everything else {header.rest}")
    tables = modulation["kind"] in ("table", "both")
    words = f"{modulation['kind']}"
    if tables:
        words += f" {modulation['dtype']}, {modulation['nodes']} times: {header.schedules()}"
    if modulation["guidance"] is not None:
        words += f", guidance {modulation['guidance']:g}"
    lines.append(f"modulation  {words}")
    sampler = header.sampler
    lines.append(
        f"sampler     {sampler['name']}, {sampler['steps']} steps, guidance {sampler['guidance']:g}"
    )
    for field in ("shape_decoder", "conditioner"):
        lines.append(f"{field.replace('shape_', ''):12}{_component(getattr(header, field))}")
    return "\n".join([*lines, "", header.sizes().describe()])


def describe_finetuning(note: Any) -> str:
    """One line about a file's fine-tuning, from notes that no reader has checked."""
    try:
        blocks = ", ".join(f"{kind} {index}" for kind, index in note["blocks"])
        return (
            f"{blocks}: {note['iterations']} iterations on {note['pictures']} images, loss on "
            f"held-out images {note['loss_before']:.4g} before, {note['loss_after']:.4g} after"
        )
    except (KeyError, TypeError, ValueError):
        return one_line(note)


def _blocks(header: PackedHeader, kind: str) -> list[str]:
    layer_map = header.layer_map
    total = layer_map.totals.get(kind, 0)
    if not total:
        return []
    layouts = _layouts(header, kind)
    bits = {i: tuple(sorted({layout.bits for layout in held})) for i, held in layouts.items()}
    counts = ", ".join(
        f"{count} in {' and '.join(map(str, widths))} bits"
        for widths, count in sorted(Counter(bits.values()).items())
    )
    groups = sorted({layout.group for held in layouts.values() for layout in held} - {0})
    group = f" (groups of {' and '.join(map(str, groups))})" if groups else ""
    # One character per block: its bits (x for 16, * for several), a dot if it was pruned.
    overview = "".join(_letter(bits[i]) if i in bits else "." for i in range(total))
    return [
        f"  {kind:10}{len(bits)} of {total} blocks kept: {counts or 'none'}{group}",
        f"  {'':10}{overview}",
    ]


def _layouts(header: PackedHeader, kind: str) -> dict[int, set[WeightLayout]]:
    """The layouts of each kept block's linears, without modulation."""
    held: dict[int, set[WeightLayout]] = {}
    for name, linear in header.network.linears().items():
        if linear.role == "block" and name.startswith(f"{BLOCK_FIELDS[kind]}."):
            held.setdefault(int(name.split(".")[1]), set()).add(header.layout(name))
    return held


def _letter(bits: tuple[int, ...]) -> str:
    return "*" if len(bits) > 1 else "x" if bits[0] == W16.bits else str(bits[0])


def _component(entry: dict[str, Any]) -> str:
    source = entry["source"]
    return f"referenced: {source['name']}" if source else entry["storage"]


def _size(count: int) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}"
    return f"{count} B"
