"""Plans automatically from vitality: which blocks are kept, and in how many bits.

    vitality = Vitality.load("vitality.json")
    layer_map = plan_auto(vitality)
    print(describe(layer_map), predict_size(vitality, layer_map).total)

Blocks below a threshold of their kind are pruned; kept blocks above a second threshold get 8 bits,
the others 4 (paper, sections 3.2.1 and 3.2.2). The published thresholds depend on the paper's EMD
implementation, so `plan_auto` derives them from the model's own pruning curve. Needs no torch.
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
    """Prunes until the distance to the original output jumps; kept blocks get 8 or 4 bits.

    Pruning follows the measured "balanced" curve (of the only kind, if there is one kind), least
    vital blocks of each kind first; each of its points is one threshold per kind. The unit is the
    model's own, the distance between two unrelated outputs, since an EMD of 0.1 means something
    else for chairs than for spheres. It stops before the first removal that leaves an image
    without a surface, or moves the output

    - by more than 5 % at once: the jump after redundant blocks. (In the paper's Table A the least
      vital kept double block moves Step1X-3D by 0.14 above the floor, some 30 %.) The first removal
      is held to the second limit alone: a debiased distance rises with the square root of a small
      change, so the first one looks large.
    - by more than 10 % in total. On a half-trained furniture model, in which nothing jumps, that is
      an IoU of 0.91 to the original output; the paper's pruned models have 0.71 to 0.79 (Table C).

    `max_distance` (debiased, in the unit of the vitality) replaces both limits. Without a curve,
    only blocks that cannot be distinguished from the sampling floor are pruned.

    Bits: per kind, log vitality is split into the two groups with the least variance within them
    (Otsu); the vital group gets 8 bits. All blocks get 8 if the largest vitality is less than 1.5
    times the smallest, since there are no two groups then.
    """
    if max_distance is not None:
        choices.distance(max_distance, "--max-distance")
    curve = vitality.curves.get("balanced") or vitality.curves.get(vitality.kinds[0], ())
    measured: CurvePoint | None = None
    if curve:
        pruned = set()
        furthest: float | None = None  # largest reach so far; None before the first removal
        for point in curve:
            if point.sigmas <= FLOOR_SIGMAS and not point.missing:
                stop = False  # not distinguishable from the original's output
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
