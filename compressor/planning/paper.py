"""The paper's own layer maps, as far as they are published.

    layer_map = plan_paper("hunyuan3d-2mini")

The counts of pruned, 8-bit and 4-bit blocks reproduce the published sizes and FLOPs. The blocks
themselves are only partly published (Step1X-3D: section F.1, Table A; the fine-tuned min-vital
blocks: A.2; TRELLIS: F.3 in words). The others are assumed to be the deepest blocks, and the notes
of each map list the assumptions. Every linear of a block gets the block's bits, whereas the paper
left Step1X-3D's double-block feed-forwards and all modulation in fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vitapack.runtime.errors import UserError
from vitapack.runtime.format.layermap import BlockEntry, LayerMap


@dataclass(frozen=True)
class PaperMap:
    """Kept blocks by kind and bits; other blocks are pruned."""

    family: str
    totals: dict[str, int]
    eight: dict[str, tuple[int, ...]]
    four: dict[str, tuple[int, ...]]
    assumed: tuple[str, ...]


def _span(*ranges: Iterable[int]) -> tuple[int, ...]:
    return tuple(index for indices in ranges for index in indices)


PAPER_MAPS = {
    "hunyuan3d-2.0": PaperMap(
        family="hunyuan3d",
        totals={"double": 16, "single": 32},
        eight={"double": _span(range(7)), "single": _span(range(20))},
        four={"double": (7, 8, 9, 11), "single": _span(range(20, 27))},
        assumed=(
            "published: 5 double and 5 single blocks pruned, double 11 and single 26 the least "
            "vital kept ones; assumed: which others are pruned or in 4 bits (the deepest)",
        ),
    ),
    "hunyuan3d-2mini": PaperMap(
        family="hunyuan3d",
        totals={"double": 8, "single": 16},
        eight={"double": (0, 1, 2, 3, 5, 6, 7), "single": _span(range(9))},
        four={"double": (4,), "single": _span(range(9, 13))},
        assumed=(
            "published: no double pruned, double 4 in 4 bits, 3 singles pruned by size (2 by "
            "FLOPs), single 12 the least vital kept one; assumed: singles 13-15 pruned, 9-12 in "
            "4 bits",
        ),
    ),
    "step1x-3d": PaperMap(
        family="step1x3d",
        totals={"double": 12, "single": 24},
        eight={"double": (0, 1, 2, 4, 6), "single": (0,)},
        four={"double": (3, 5), "single": _span(range(1, 7))},
        assumed=("published: all but which single of 0-6 is in 8 bits; assumed: single 0",),
    ),
    "trellis-ss": PaperMap(
        family="trellis",
        totals={"block": 24},
        eight={"block": _span(range(9))},
        four={"block": _span(range(9, 18))},
        assumed=(
            "published: 6 blocks pruned, 9 in 4 bits, block 0 and then 6 the most vital, 20-23 "
            "little; assumed: 18-23 pruned, 9-17 in 4 bits",
        ),
    ),
}


def paper_variant(family: str, totals: Mapping[str, int]) -> str:
    """The published model with this family and block counts. Raises UserError if there is none."""
    for variant, paper in PAPER_MAPS.items():
        if family == paper.family and paper.totals == dict(totals):
            return variant
    counts = " and ".join(f"{count} {kind}" for kind, count in totals.items())
    raise UserError(
        f"the paper has no layer map for {family} with {counts} blocks, only for "
        f"{', '.join(PAPER_MAPS)}; use the automatic plan"
    )


def plan_paper(variant: str) -> LayerMap:
    """The published layer map of a variant in PAPER_MAPS. Raises UserError for another one."""
    if variant not in PAPER_MAPS:
        raise UserError(f"no published layer map {variant!r}: choose {', '.join(PAPER_MAPS)}")
    paper = PAPER_MAPS[variant]
    bits = {
        (kind, index): width
        for width, blocks in ((8, paper.eight), (4, paper.four))
        for kind, indices in blocks.items()
        for index in indices
    }
    blocks = tuple(
        BlockEntry(kind, index, bits[kind, index])
        for kind, total in paper.totals.items()
        for index in range(total)
        if (kind, index) in bits
    )
    notes = {"variant": variant, "assumed": list(paper.assumed)}
    return LayerMap(paper.family, dict(paper.totals), blocks, how="paper", notes=notes)
