"""Plans by thresholds on vitality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vitapack.compressor.planning.layer_maps import OTHER_BITS, VITAL_BITS, _layer_map
from vitapack.compressor.vitality.table import BlockVitality, Vitality
from vitapack.runtime import choices
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.layermap import LayerMap

DIGITS = 6  # decimals of figures in notes


def plan_thresholds(
    vitality: Vitality,
    tau: Mapping[str, float] | None = None,
    tau8: Mapping[str, float] | None = None,
    *,
    group: int = 32,
) -> LayerMap:
    """Plans by given thresholds per kind, as in the paper: blocks with a vitality below `tau` are
    pruned, kept blocks above `tau8` get 8 bits, the others 4.

    Vitality is the mean distance that `analyze` shows, sampling floor included. A kind without
    `tau` keeps all its blocks; a kind without `tau8` gets 8 bits in all of them. Raises UserError
    for a kind that this network does not have, and if a kind would lose all its blocks.
    """
    tau, tau8 = dict(tau or {}), dict(tau8 or {})
    for name, values in (("tau", tau), ("tau8", tau8)):
        for kind, value in values.items():
            choices.distance(value, f"--{name}-{kind}")
            if kind not in vitality.kinds:
                known = " and ".join(f"--{name}-{kind}" for kind in vitality.kinds)
                raise UserError(f"--{name}-{kind}: this network has no {kind} blocks; use {known}")
    bits = {}
    for block in vitality.blocks:
        if block.mean >= tau.get(block.kind, 0.0):
            vital = block.kind not in tau8 or block.mean > tau8[block.kind]
            bits[block.kind, block.index] = VITAL_BITS if vital else OTHER_BITS
    for kind in vitality.kinds:
        if not any(key[0] == kind for key in bits):
            most = max(block.mean for block in vitality.blocks if block.kind == kind)
            raise UserError(
                f"--tau-{kind} {tau[kind]:g} prunes all {vitality.totals[kind]} {kind} blocks; "
                f"the most vital one has {most:.4g}, choose at most that"
            )
    notes = {
        "thresholds": {
            kind: {"prune below": tau.get(kind, 0.0), "8 bits above": tau8.get(kind, 0.0)}
            for kind in vitality.kinds
        }
    }
    return _layer_map(vitality, bits, "thresholds", group, notes)


def _thresholds(
    vitality: Vitality, bits: Mapping[tuple[str, int], int]
) -> dict[str, dict[str, float]]:
    """The raw vitalities that separate pruned, 4-bit and 8-bit blocks of each kind, if they do."""
    result = {}
    for kind in vitality.kinds:
        ranked = vitality.ranked(kind)
        level = [bits.get((block.kind, block.index), 0) for block in ranked]
        result[kind] = {
            name: round(_border(ranked, sum(value <= most for value in level)), DIGITS)
            for name, most in (("prune below", 0), ("8 bits above", OTHER_BITS))
        }
    return result


def _border(ranked: Sequence[BlockVitality], count: int) -> float:
    """Midway between the first `count` blocks and the others; 0 if count is 0."""
    if count == 0:
        return 0.0
    if count == len(ranked):
        return ranked[-1].mean
    return (ranked[count - 1].mean + ranked[count].mean) / 2
