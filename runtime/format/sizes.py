"""Bytes of a packed file by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitapack.kernels.linear.layouts import LAYOUTS


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


def size_table(sizes: Mapping[str, int], linears: Mapping[str, str], header: int) -> SizeTable:
    """Sums bytes per part; `sizes` by name in the file, `header` the bytes before the data."""
    widths = [layout.bits for layout in sorted(LAYOUTS.values(), key=lambda w: not w.packed)]
    parts = dict.fromkeys(
        (*(f"{bits}-bit weights" for bits in widths), "modulation tables", "modulation weights",
         "biases, norms, edges", "shape decoder", "conditioner"), 0,
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
        return f"{LAYOUTS[linears[owner]].bits}-bit weights"
    return "biases, norms, edges"
