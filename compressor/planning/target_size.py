"""Plans for a file size."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitapack.compressor.planning.layer_maps import OTHER_BITS, VITAL_BITS, _layer_map
from vitapack.compressor.planning.sizes import FOUR_BIT_SHARE, predict_size
from vitapack.compressor.planning.thresholds import _thresholds
from vitapack.compressor.vitality.table import Vitality
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults


def plan_target_size(
    vitality: Vitality,
    size: int,
    *,
    embedded_bytes: int = 0,
    schedules: Sequence[SamplerDefaults] | None = None,
    modulation: str = "table",
    group: int = 32,
) -> LayerMap:
    """Plans a file of at most `size` bytes, `embedded_bytes` of them for embedded components.

    All blocks start in 8 bits. Moves (a block to 4 bits, or a 4-bit block pruned) are made in order
    of harm per byte saved; harm is the debiased vitality, or 1/16 of it for 4 bits. The order does
    not depend on `size`, so a smaller size never keeps a block that a larger one prunes. The most
    vital block of each kind is always kept. Raises UserError with the smallest reachable size if
    `size` is below it.
    """
    ladder = _ladder(vitality, modulation, schedules, group)

    def total(step: int) -> int:
        return (
            embedded_bytes
            + predict_size(vitality, ladder[step], schedules=schedules, modulation=modulation).total
        )

    steps = range(len(ladder))
    step = bisect.bisect_left(steps, -size, key=lambda step: -total(step))
    if step == len(ladder):
        least = total(len(ladder) - 1)
        raise UserError(
            f"{size} bytes ({size / 2**20:.3g} MiB) cannot be reached: with one 4-bit block of "
            f"each kind the file still takes {least} bytes ({least / 2**20:.3g} MiB)"
        )
    layer_map = ladder[step]
    bits = {(block.kind, block.index): block.bits for block in layer_map.blocks}
    notes = {
        "target bytes": size,
        "predicted bytes": total(step),
        "thresholds": _thresholds(vitality, bits),
    }
    return replace(layer_map, notes=layer_map.notes | notes)


def _ladder(
    vitality: Vitality,
    modulation: str,
    schedules: Sequence[SamplerDefaults] | None,
    group: int,
) -> list[LayerMap]:
    """Layer maps from all blocks in 8 bits down to one 4-bit block of each kind."""
    bits = {(block.kind, block.index): VITAL_BITS for block in vitality.blocks}
    always = {
        (block.kind, block.index) for kind in vitality.kinds for block in vitality.ranked(kind)[-1:]
    }

    def size(values: Mapping[tuple[str, int], int]) -> int:
        layer_map = _layer_map(vitality, values, "target size", group, {})
        return predict_size(vitality, layer_map, schedules=schedules, modulation=modulation).dit

    moves = []
    whole = size(bits)
    saved = {}
    for kind in vitality.kinds:  # all blocks of a kind have the same size
        first = (kind, 0)
        four = size(bits | {first: OTHER_BITS})
        pruned = size({key: value for key, value in bits.items() if key != first})
        saved[kind] = whole - four, four - pruned
    for block in vitality.blocks:
        key = (block.kind, block.index)
        harm = 0.0 if block.non_vital else block.debiased
        to_four = FOUR_BIT_SHARE * harm / saved[block.kind][0]
        to_none = max(to_four, (1 - FOUR_BIT_SHARE) * harm / saved[block.kind][1])
        place = vitality.ranked(block.kind).index(block)
        moves.append((to_four, 1, place, key, OTHER_BITS))
        if key not in always:
            moves.append((to_none, 2, place, key, 0))
    states = [dict(bits)]
    for *_, key, value in sorted(moves):
        if value:
            bits[key] = value
        else:
            del bits[key]
        states.append(dict(bits))
    return [_layer_map(vitality, state, "target size", group, {}) for state in states]
