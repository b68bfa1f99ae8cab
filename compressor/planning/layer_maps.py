"""Builds layer maps from the bits of kept blocks; chooses the blocks that get 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from vitapack.compressor.vitality.table import BlockVitality, Vitality
from vitapack.runtime.format.layermap import BlockEntry, LayerMap

# Bits of kept blocks: as in the paper, vital ones get 8 and the others 4.
VITAL_BITS, OTHER_BITS = 8, 4

# A kind is split into 8-bit and 4-bit blocks only if its vitalities differ by this factor.
LEAST_SPREAD = 1.5

# Log-vitality below this share of the sampling floor is noise: a debiased value of 0.2 floors is
# a raw value 2 % above the floor.
FLOOR_SHARE = 0.2


class Checkpoint(Protocol):
    """The fields of an original that resolving a plan needs."""

    @property
    def family(self) -> str: ...

    @property
    def variant(self) -> str: ...

    @property
    def config(self) -> Any: ...  # an Architecture


def plan_random(seed: int, like: LayerMap) -> LayerMap:
    """Prunes as many random blocks of each kind as `like`, with as many blocks in 8 and 4 bits."""
    rng = np.random.default_rng(seed)
    blocks = []
    for kind, total in like.totals.items():
        bits = rng.permutation([block.bits for block in like.blocks if block.kind == kind])
        kept = sorted(rng.choice(total, size=len(bits), replace=False).tolist())
        blocks += [BlockEntry(kind, i, int(b)) for i, b in zip(kept, bits, strict=True)]
    return replace(
        like,
        blocks=tuple(blocks),
        how=f"random (seed {seed}), like {like.how}",
        notes={key: like.notes[key] for key in ("model", "source_sha256") if key in like.notes},
    )


def _layer_map(
    vitality: Vitality,
    bits: Mapping[tuple[str, int], int],
    how: str,
    group: int,
    notes: dict[str, Any],
) -> LayerMap:
    blocks = tuple(
        BlockEntry(block.kind, block.index, bits[block.kind, block.index], block.mean)
        for block in vitality.blocks
        if (block.kind, block.index) in bits
    )
    origin = {
        "model": vitality.model,
        "source_sha256": vitality.source_sha256,
        "metric": vitality.settings["metric"],
        "images": len({row["image"] for row in vitality.rows}),
    }
    return LayerMap(
        vitality.family, dict(vitality.totals), blocks, how=how, group=group, notes=origin | notes
    )


def _floor_blocks(vitality: Vitality) -> set[tuple[str, int]]:
    """Blocks at the sampling floor, but never all of a kind."""
    blocks = set()
    for kind in vitality.kinds:
        blocks |= {(b.kind, b.index) for b in vitality.ranked(kind)[:-1] if b.non_vital}
    return blocks


def _vital_group(kept: Iterable[BlockVitality]) -> set[tuple[str, int]]:
    """The more vital of the two groups of one kind; all blocks if there are no two groups."""
    blocks = sorted(kept, key=lambda block: (block.mean, -block.index))
    if not blocks:
        return set()
    # Debiased, since a common floor compresses the ratios. Floors differ slightly between blocks,
    # so the values are made ascending like the raw ones.
    values = np.maximum.accumulate(
        [max(block.debiased, FLOOR_SHARE * block.floor, 1e-12) for block in blocks]
    )
    if len(blocks) < 2 or values[-1] < LEAST_SPREAD * values[0]:
        return {(block.kind, block.index) for block in blocks}
    split = _otsu(np.log(values))
    return {(block.kind, block.index) for block in blocks[split:]}


def _otsu(values: np.ndarray) -> int:
    """Index that splits ascending values into two groups with the least variance within them."""
    cuts = range(1, len(values))
    inside = [values[:cut].var() * cut + values[cut:].var() * (len(values) - cut) for cut in cuts]
    return cuts[int(np.argmin(inside))]
