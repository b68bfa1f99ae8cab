"""Sizes of a packed file by section, such as "4-bit weights"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitapack.kernels.linear.layouts import LAYOUTS


@dataclass(frozen=True)
class SizeTable:
    """Bytes by section; the sections add up to the whole file."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def dit(self) -> int:
        """Bytes of the network alone: without shape decoder, conditioner and header."""
        return self.total - sum(
            self.parts.get(name, 0) for name in ("shape decoder", "conditioner", "header")
        )

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.parts, "dit": self.dit, "total": self.total}

    def describe(self) -> str:
        """A table of MiB by section, without empty sections."""
        rows = [(name, size) for name, size in self.parts.items() if size]
        rows += [("network", self.dit), ("file", self.total)]
        return "\n".join(f"{name:22}{size / 2**20:10.3f} MiB{size:15,} B" for name, size in rows)


def size_table(sizes: Mapping[str, int], linears: Mapping[str, str], header: int) -> SizeTable:
    """Sums bytes by section. sizes: by tensor name in the file; header: bytes before the data."""
    widths = [layout.bits for layout in sorted(LAYOUTS.values(), key=lambda w: not w.packed)]
    sections = dict.fromkeys(
        (*(f"{bits}-bit weights" for bits in widths), "modulation tables", "modulation weights",
         "biases, norms, edges", "shape decoder", "conditioner"), 0,
    )  # fmt: skip
    for name, nbytes in sizes.items():
        sections[_section(name, linears)] += nbytes
    return SizeTable(sections | {"header": header})


def _section(name: str, linears: Mapping[str, str]) -> str:
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
