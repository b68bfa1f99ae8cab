"""From vitality to a layer map: which blocks stay, and in how many bits.

    vitality = Vitality.load("vitality.json")
    layer_map = plan_auto(vitality)
    print(describe(layer_map), predict_size(vitality, layer_map).total)

Blocks below a threshold of their kind are pruned, kept ones above a second threshold get 8 bits and
the others 4 (paper, sections 3.2.1 and 3.2.2). The published thresholds belong to another EMD
implementation, so `plan_auto` finds them in the model's own curve. No torch needed.
"""

from __future__ import annotations

from typing import Any

from vitapack.compressor.planning.layer_maps import (
    OTHER_BITS,
    VITAL_BITS,
    _floor_blocks,
    _layer_map,
    _vital_group,
)
from vitapack.compressor.planning.thresholds import DIGITS, _thresholds
from vitapack.compressor.vitality.table import FLOOR_SIGMAS, CurvePoint, Vitality
from vitapack.runtime import choices
from vitapack.runtime.format.layermap import LayerMap

# In units of the distance between two unrelated outputs of the model (Vitality.scale).
MAX_REACH = 0.10
JUMP = 0.05


def plan_auto(
    vitality: Vitality, *, max_distance: float | None = None, group: int = 32
) -> LayerMap:
    """Prunes until the distance to the full output jumps, then splits the rest into 8 and 4 bits.

    Pruning walks the measured "balanced" curve (one kind only: that kind's), least vital blocks of
    each kind first, in which every point is a threshold for doubles and one for singles. The unit
    is the model's own, the distance between two unrelated outputs, since an EMD of 0.1 means
    something else for chairs than for spheres. It stops before the first removal that leaves a
    picture without a surface, or moves the output

    - by more than 5 % further at once: the jump after redundant blocks. (In the paper's Table A
      the least vital double that is kept moves Step1X-3D by 0.14 above the floor, some 30 %.) The
      first removal has no step before it and is held to the second limit alone: a debiased
      distance rises with the square root of a small change, so the first one looks large.
    - further than 10 % in all. On a half-trained furniture model, where nothing jumps, that is an
      IoU of 0.91 to the full output; the paper's pruned models have 0.71 to 0.79 (its Table C).

    `max_distance` (debiased, in the unit of the vitality) replaces both limits. Without a curve
    only the blocks that cannot be told from the sampling floor are pruned.

    Bits: per kind, the split of log vitality into two groups with the least variance inside them
    (Otsu); the vital group gets 8. All get 8 where the largest is less than 1.5 times the smallest:
    then there are no two groups.
    """
    if max_distance is not None:
        choices.distance(max_distance, "--max-distance")
    curve = vitality.curves.get("balanced") or vitality.curves.get(vitality.kinds[0], ())
    measured: CurvePoint | None = None
    if curve:
        pruned = set()
        furthest: float | None = None  # that the output has moved so far; None before any step
        for point in curve:
            if point.sigmas <= FLOOR_SIGMAS and not point.missing:
                stop = False  # the output is still the full model's, as far as sampling can tell
            elif max_distance is not None:
                stop = point.debiased > max_distance
            else:
                jumped = furthest is not None and point.reach - furthest > JUMP
                stop = jumped or point.reach > MAX_REACH
            if stop or point.missing:
                break
            visible = point.reach if point.sigmas > FLOOR_SIGMAS else 0.0
            furthest = max(furthest or 0.0, visible)
            pruned.add((point.kind, point.index))
            measured = point
    else:
        pruned = _floor_blocks(vitality)
    kept = [block for block in vitality.blocks if (block.kind, block.index) not in pruned]
    eight: set[tuple[str, int]] = set()
    for kind in vitality.kinds:
        eight |= _vital_group([block for block in kept if block.kind == kind])
    bits = {
        (b.kind, b.index): VITAL_BITS if (b.kind, b.index) in eight else OTHER_BITS for b in kept
    }
    how = "auto" if max_distance is None else f"auto, max distance {max_distance:g}"
    notes: dict[str, Any] = {"thresholds": _thresholds(vitality, bits)}
    if measured is not None:
        notes["pruned output"] = {
            "distance": round(measured.debiased, DIGITS),
            "reach": round(measured.reach, DIGITS),
            "iou": round(measured.iou, DIGITS),
        }
    return _layer_map(vitality, bits, how, group, notes)
