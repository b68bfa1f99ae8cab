"""Plans by thresholds on vitality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vitapack.compressor.planning.layer_maps import _layer_map
from vitapack.compressor.vitality.table import BlockVitality, Vitality
from vitapack.runtime.errors import UserError
from vitapack.runtime.format.layermap import LayerMap

DIGITS = 6  # of figures in notes


def plan_thresholds(
    vitality: Vitality,
    *,
    tau_double: float | None = None,
    tau_single: float | None = None,
    tau8_double: float | None = None,
    tau8_single: float | None = None,
    tau_block: float | None = None,
    tau8_block: float | None = None,
    group: int = 32,
) -> LayerMap:
    """The paper's rule by hand: blocks with V below `tau_*` go, those above `tau8_*` get 8 bits.

    V is the mean distance as `analyze` shows it, sampling floor included. A tau left out prunes
    nothing, a tau8 left out gives 8 bits to all. UserError if a kind would lose all its blocks.
    """
    taus = {"double": tau_double, "single": tau_single, "block": tau_block}
    taus8 = {"double": tau8_double, "single": tau8_single, "block": tau8_block}
    for prefix, values in (("tau", taus), ("tau8", taus8)):
        for kind, tau in values.items():
            if tau is None:
                continue
            if not (math.isfinite(tau) and tau >= 0):
                raise UserError(f"{prefix}_{kind} {tau}: expected a distance of at least 0")
            if kind not in vitality.kinds:
                raise UserError(
                    f"{prefix}_{kind}: this network has no {kind} blocks, only "
                    f"{' and '.join(vitality.kinds)}"
                )
    bits = {}
    for block in vitality.blocks:
        tau, tau8 = taus[block.kind], taus8[block.kind]
        if tau is None or block.mean >= tau:
            bits[block.kind, block.index] = 8 if tau8 is None or block.mean > tau8 else 4
    for kind in vitality.kinds:
        if not any(key[0] == kind for key in bits):
            most = max(block.mean for block in vitality.blocks if block.kind == kind)
            raise UserError(
                f"tau_{kind} {taus[kind]:g} prunes all {vitality.totals[kind]} {kind} blocks; the "
                f"most vital one has {most:.4g}, choose at most that"
            )
    notes = {
        "thresholds": {
            kind: {"prune below": taus[kind] or 0.0, "8 bits above": taus8[kind] or 0.0}
            for kind in vitality.kinds
        }
    }
    return _layer_map(vitality, bits, "thresholds", group, notes)


def _thresholds(
    vitality: Vitality, bits: Mapping[tuple[str, int], int]
) -> dict[str, dict[str, float]]:
    """The raw vitalities that separate pruned | 4 bits | 8 bits of each kind, where they do."""
    found = {}
    for kind in vitality.kinds:
        ranked = vitality.ranked(kind)
        level = [bits.get((block.kind, block.index), 0) for block in ranked]
        found[kind] = {
            name: round(_border(ranked, sum(value <= most for value in level)), DIGITS)
            for name, most in (("prune below", 0), ("8 bits above", 4))
        }
    return found


def _border(ranked: Sequence[BlockVitality], count: int) -> float:
    """Half way between the first `count` blocks and the others; 0 for none of them."""
    if count == 0:
        return 0.0
    if count == len(ranked):
        return ranked[-1].mean
    return (ranked[count - 1].mean + ranked[count].mean) / 2
