"""What a packed file holds, for people: made from its header alone, without torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vitapack.runtime.format.container import one_line
from vitapack.runtime.format.header import PackedHeader
from vitapack.runtime.format.layermap import KINDS

NOTE = "finetuned"  # what `vitapack finetune` leaves in the layer map's notes


def describe(header: PackedHeader) -> str:
    """A page of text; `header.to_json()` is the same for machines."""
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
        lines.append(f"{field.replace('shape_', ''):12}{_part(getattr(header, field))}")
    return "\n".join([*lines, "", header.sizes().describe()])


def describe_finetuning(note: Any) -> str:
    """One line of what a file says of its fine-tuning, which no reader has checked."""
    try:
        blocks = ", ".join(f"{kind} {index}" for kind, index in note["blocks"])
        return (
            f"{blocks}: {note['iterations']} iterations on {note['pictures']} pictures, loss on "
            f"held-out paths {note['loss_before']:.4g} before, {note['loss_after']:.4g} after"
        )
    except (KeyError, TypeError, ValueError):
        return one_line(note)


def _blocks(header: PackedHeader, kind: str) -> list[str]:
    layer_map = header.layer_map
    total = layer_map.totals.get(kind, 0)
    if not total:
        return []
    kept = layer_map.kept(kind)
    widths = Counter(layer_map.bits(kind, index) for index in kept)
    counts = ", ".join(f"{count} in {bits} bits" for bits, count in sorted(widths.items()))
    group = f" (groups of {layer_map.group})" if 4 in widths else ""
    # One character a block: its bits (x for 16), a dot where it was pruned.
    picture = "".join(
        {4: "4", 8: "8", 16: "x"}[layer_map.bits(kind, index)] if index in kept else "."
        for index in range(total)
    )
    return [
        f"  {kind:10}{len(kept)} of {total} blocks kept: {counts or 'none'}{group}",
        f"  {'':10}{picture}",
    ]


def _part(entry: dict[str, Any]) -> str:
    source = entry["source"]
    return f"referenced: {source['name']}" if source else entry["storage"]


def _size(count: int) -> str:
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= bytes_:
            return f"{count / bytes_:.2f} {unit}"
    return f"{count} B"
