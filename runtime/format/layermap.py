"""The layer map: the kept blocks and the bits of each, from the compressor to the runtime.

It is torch-free, so that `inspect` can read it. Bits here are those planned; the layout in which a
linear is stored is in the packed file's `linears`. A block keeps its original index: pruning
removes an entry and renumbers nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from vitapack.kernels.linear.layouts import LAYOUTS

KINDS = ("double", "single", "block")  # "block": the single-kind network of TRELLIS
# By block kind, the name of its list of blocks in configurations, modules and tensor names.
BLOCK_FIELDS = {"double": "double_blocks", "single": "single_blocks", "block": "blocks"}
KIND_OF = {field: kind for kind, field in BLOCK_FIELDS.items()}


def _known(field: str) -> list[int]:
    """The values above 0 of a field of the weight layouts, ascending."""
    return sorted({getattr(layout, field) for layout in LAYOUTS.values()} - {0})


def _either(numbers: list[int]) -> str:
    """Numbers as text, such as "4, 8 or 16"."""
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


@dataclass(frozen=True)
class BlockEntry:
    """One kept block."""

    kind: str
    index: int  # in the original network
    bits: int  # planned for its linears, except modulation: 4, 8, or 16 for unchanged fp16
    vitality: float | None = None  # None if it was not measured

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"block kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not isinstance(self.index, int) or isinstance(self.index, bool) or self.index < 0:
            raise ValueError(f"block index {self.index!r}: expected an integer >= 0")
        if type(self.bits) is not int or self.bits not in _known("bits"):
            expected = _either(_known("bits"))
            raise ValueError(f"{self.kind} {self.index}: bits {self.bits!r}: expected {expected}")
        if self.vitality is not None and not math.isfinite(self.vitality):
            raise ValueError(f"{self.kind} {self.index}: vitality {self.vitality} is not finite")


@dataclass(frozen=True)
class LayerMap:
    """The kept blocks of one network, in the order in which they run."""

    family: str
    totals: dict[str, int]  # blocks of each kind in the original network
    blocks: tuple[BlockEntry, ...]
    how: str = ""  # how the map was made: "auto", "paper", "uniform int8", thresholds, ...
    group: int = 32  # input channels that share a 4-bit group scale
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.group not in _known("group"):
            raise ValueError(f"group {self.group!r}: expected {_either(_known('group'))}")
        seen: set[tuple[str, int]] = set()
        for block in self.blocks:
            key = (block.kind, block.index)
            if key in seen:
                raise ValueError(f"{block.kind} {block.index} is listed twice")
            seen.add(key)
            total = self.totals.get(block.kind, 0)
            if block.index >= total:
                raise ValueError(
                    f"{block.kind} {block.index}: the network has only {total} such blocks"
                )

    def kept(self, kind: str) -> tuple[int, ...]:
        """Original indices of the kept blocks of one kind, ascending."""
        return tuple(sorted(block.index for block in self.blocks if block.kind == kind))

    def pruned(self, kind: str) -> tuple[int, ...]:
        kept = set(self.kept(kind))
        return tuple(index for index in range(self.totals.get(kind, 0)) if index not in kept)

    def bits(self, kind: str, index: int) -> int:
        """Bits of a kept block. Raises KeyError if it was pruned."""
        for block in self.blocks:
            if (block.kind, block.index) == (kind, index):
                return block.bits
        raise KeyError(f"{kind} {index} is not in the layer map")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_json(cls, data: Any) -> LayerMap:
        """Reads a layer map. Raises ValueError naming the wrong or unknown field."""
        if not isinstance(data, dict):
            raise ValueError(f"layer map: expected an object, found {type(data).__name__}")
        known = {"family", "totals", "blocks", "how", "group", "notes"}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"layer map: unknown fields {', '.join(map(str, unknown))}")
        if missing := sorted({"family", "totals", "blocks"} - set(data)):
            raise ValueError(f"layer map: missing fields {', '.join(missing)}")
        totals = data["totals"]
        if not isinstance(totals, dict) or not all(
            kind in KINDS and type(count) is int and 0 <= count < 10_000
            for kind, count in totals.items()
        ):
            raise ValueError(f"layer map: totals {totals!r}: expected counts by block kind")
        if not isinstance(data["blocks"], list):
            raise ValueError("layer map: blocks: expected a list")
        if not isinstance(data["family"], str) or not isinstance(data.get("how", ""), str):
            raise ValueError("layer map: family and how: expected texts")
        try:
            blocks = tuple(BlockEntry(**block) for block in data["blocks"])
        except TypeError as error:
            raise ValueError(f"layer map: a block entry is malformed: {error}") from None
        return cls(
            family=data["family"],
            totals=dict(totals),
            blocks=blocks,
            how=data.get("how", ""),
            group=data.get("group", 32),
            notes=dict(data.get("notes") or {}),
        )

    @classmethod
    def uniform(cls, family: str, totals: dict[str, int], bits: int, group: int = 32) -> LayerMap:
        """Keeps every block with the same bits, as `--plan int8` and `--plan int4` do."""
        blocks = tuple(
            BlockEntry(kind, index, bits) for kind in KINDS for index in range(totals.get(kind, 0))
        )
        how = "unquantized" if bits == 16 else f"uniform int{bits}"
        return cls(family, totals, blocks, how=how, group=group)

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=1, sort_keys=True)
