"""From vitality to a layer map: which blocks stay, and in how many bits.

    vitality = Vitality.load("vitality.json")
    layer_map = plan_auto(vitality)
    print(describe(layer_map), predict_size(vitality, layer_map).total)

Blocks below a threshold of their kind are pruned, kept ones above a second threshold get 8 bits and
the others 4 (paper, sections 3.2.1 and 3.2.2). The published thresholds belong to another EMD
implementation, so `plan_auto` finds them in the model's own curve. No torch needed.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitapack.compressor.paper_maps import paper_variant, plan_paper
from vitapack.compressor.vitality_table import (
    FLOOR_SIGMAS,
    BlockVitality,
    CurvePoint,
    Vitality,
)
from vitapack.runtime.container import lay_out, one_line, parse_json
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.layermap import BLOCK_FIELDS, BlockEntry, LayerMap, kept_blocks
from vitapack.runtime.packed_header import KEY, encode, schedule_nodes
from vitapack.runtime.packed_layout import SizeTable, model_tensors, plan_linears, size_table
from vitapack.runtime.sampling import SamplerDefaults

__all__ = [
    "describe",
    "from_options",
    "load_plan",
    "plan_auto",
    "plan_paper",
    "plan_random",
    "plan_target_size",
    "plan_thresholds",
    "predict_size",
    "resolve_plan",
]

# In units of the distance between two unrelated outputs of the model (Vitality.scale).
MAX_REACH = 0.10
JUMP = 0.05
# 8-bit and 4-bit blocks are told apart only where the vitalities of a kind differ by this factor.
LEAST_SPREAD = 1.5
# Log-vitality below this share of the sampling floor is noise: a debiased value of 0.2 floors is
# a raw value 2 % above the floor.
FLOOR_SHARE = 0.2
# What 4 bits cost a block, as a share of what its absence costs. The furniture model's first try:
# all of 12 blocks in 4 bits lose 0.03 to 0.09 of IoU together, one single block left out 0.10 to
# 0.20; in quadrature over the blocks that is 1/10 to 1/20.
FOUR_BIT_SHARE = 1 / 16
DIGITS = 6  # of figures in notes


class Checkpoint(Protocol):
    """What a plan by name needs to know of an original."""

    @property
    def family(self) -> str: ...

    @property
    def variant(self) -> str: ...

    @property
    def config(self) -> Any: ...  # DiTConfig


# --- The planners ------------------------------------------------------------------------------


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
    if max_distance is not None and not (math.isfinite(max_distance) and max_distance >= 0):
        raise UserError(f"max distance {max_distance}: expected a distance of at least 0")
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
    bits = {(b.kind, b.index): 8 if (b.kind, b.index) in eight else 4 for b in kept}
    how = "auto" if max_distance is None else f"auto, max distance {max_distance:g}"
    notes: dict[str, Any] = {"thresholds": _thresholds(vitality, bits)}
    if measured is not None:
        notes["pruned output"] = {
            "distance": round(measured.debiased, DIGITS),
            "reach": round(measured.reach, DIGITS),
            "iou": round(measured.iou, DIGITS),
        }
    return _layer_map(vitality, bits, how, group, notes)


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


def plan_target_size(
    vitality: Vitality,
    size: int,
    *,
    beside: int = 0,
    schedules: Sequence[SamplerDefaults] | None = None,
    modulation: str = "table",
    group: int = 32,
) -> LayerMap:
    """The least harm that fits into `size` bytes of file, `beside` of them for embedded parts.

    All blocks start in 8 bits. Moves (a block to 4 bits; a 4-bit block away) are made in the order
    of harm per byte saved, harm being the debiased vitality, or 1/16 of it for 4 bits. The order
    does not depend on `size`, so a smaller size never keeps what a larger one gave up. One block
    of each kind, the most vital one, always stays. UserError with the smallest reachable size.
    """
    ladder = _ladder(vitality, modulation, schedules, group)

    def total(step: int) -> int:
        return (
            beside
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
    found = ladder[step]
    bits = {(block.kind, block.index): block.bits for block in found.blocks}
    notes = {
        "target bytes": size,
        "predicted bytes": total(step),
        "thresholds": _thresholds(vitality, bits),
    }
    return replace(found, notes=found.notes | notes)


def plan_random(seed: int, like: LayerMap) -> LayerMap:
    """As many blocks of each kind pruned, and as many in 8 bits, as in `like`, but drawn by lot."""
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
    found = set()
    for kind in vitality.kinds:
        found |= {(b.kind, b.index) for b in vitality.ranked(kind)[:-1] if b.non_vital}
    return found


def _vital_group(kept: Iterable[BlockVitality]) -> set[tuple[str, int]]:
    """The upper of the two groups of one kind; all blocks where there are no two."""
    blocks = sorted(kept, key=lambda block: (block.mean, -block.index))
    if not blocks:
        return set()
    # Debiased, since a common floor squeezes the ratios; ascending as the raw values are, though
    # floors differ a little from block to block.
    values = np.maximum.accumulate(
        [max(block.debiased, FLOOR_SHARE * block.floor, 1e-12) for block in blocks]
    )
    if len(blocks) < 2 or values[-1] < LEAST_SPREAD * values[0]:
        return {(block.kind, block.index) for block in blocks}
    split = _otsu(np.log(values))
    return {(block.kind, block.index) for block in blocks[split:]}


def _otsu(values: np.ndarray) -> int:
    """Where to cut ascending values so that the two groups vary least inside."""
    cuts = range(1, len(values))
    inside = [values[:cut].var() * cut + values[cut:].var() * (len(values) - cut) for cut in cuts]
    return cuts[int(np.argmin(inside))]


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


def _ladder(
    vitality: Vitality,
    modulation: str,
    schedules: Sequence[SamplerDefaults] | None,
    group: int,
) -> list[LayerMap]:
    """Layer maps from all blocks in 8 bits down to one 4-bit block of each kind."""
    bits = {(block.kind, block.index): 8 for block in vitality.blocks}
    always = {
        (block.kind, block.index) for kind in vitality.kinds for block in vitality.ranked(kind)[-1:]
    }

    def size(values: Mapping[tuple[str, int], int]) -> int:
        layer_map = _layer_map(vitality, values, "target size", group, {})
        return predict_size(vitality, layer_map, schedules=schedules, modulation=modulation).dit

    moves = []
    whole = size(bits)
    saved = {}
    for kind in vitality.kinds:  # blocks of a kind are of one size
        first = (kind, 0)
        four = size(bits | {first: 4})
        gone = size({key: value for key, value in bits.items() if key != first})
        saved[kind] = whole - four, four - gone
    for block in vitality.blocks:
        key = (block.kind, block.index)
        harm = 0.0 if block.non_vital else block.debiased
        to_four = FOUR_BIT_SHARE * harm / saved[block.kind][0]
        to_none = max(to_four, (1 - FOUR_BIT_SHARE) * harm / saved[block.kind][1])
        place = vitality.ranked(block.kind).index(block)
        moves.append((to_four, 1, place, key, 4))
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


# --- Sizes -------------------------------------------------------------------------------------


def predict_size(
    vitality: Vitality,
    layer_map: LayerMap,
    *,
    schedules: Sequence[SamplerDefaults] | None = None,
    modulation: str = "table",
) -> SizeTable:
    """Bytes of the packed network by part, exact; the header to within its few free texts.

    schedules: of the modulation tables, default the one that the analysis sampled with. Shape
    decoder and conditioner, where they are embedded, come on top; `compress --dry-run` counts them.
    """
    if schedules is None:
        schedules = [SamplerDefaults.from_json(vitality.settings["sampler"])]
    if modulation not in ("table", "both"):
        schedules = []
    network = vitality.network | {
        BLOCK_FIELDS[kind]: list(layer_map.kept(kind)) for kind in vitality.kinds
    }
    linears = plan_linears(network, layer_map, modulation)
    tables = {
        "kind": modulation,
        "dtype": "F16",
        "guidance": None,
        "nodes": len(schedule_nodes(schedules)),
        "schedules": [schedule.to_json() for schedule in schedules],
    }
    # Settings of decoder and conditioner are not known here, and the notes must not change the
    # size that they state: 1 KiB each is more than any has.
    part = {"storage": "referenced", "config": {"": " " * 1024}, "source": {}}
    layer_map = replace(layer_map, how="", notes={"": " " * 1024})
    source = {"name": vitality.model, "sha256": vitality.source_sha256, "bytes": 10**10}
    text = encode(
        tool="vitapack 00.00.00", family=vitality.family, variant=" " * 32, network=network,
        source=source, layer_map=layer_map, linears=linears, rest="F16", quantizer="search",
        modulation=tables, sampler=vitality.settings["sampler"], shape_decoder=part,
        conditioner=part,
    )  # fmt: skip
    layout = lay_out(model_tensors(network, linears, "F16", tables), {KEY: text})
    sizes = {name: info.nbytes for name, info in layout.tensors.items()}
    return size_table(sizes, linears, len(layout.header))


# --- Plans in words and files ------------------------------------------------------------------


def describe(layer_map: LayerMap) -> str:
    """The map for people: per kind what is kept in how many bits, and where the borders lie."""
    kept, total = len(layer_map.blocks), sum(layer_map.totals.values())
    lines = [f"{layer_map.family}, {layer_map.how or 'by hand'}: {kept} of {total} blocks kept"]
    for kind, count in layer_map.totals.items():
        lines.append(f"{kind} blocks ({count})")
        for bits in (16, 8, 4):
            if some := [b.index for b in layer_map.blocks if (b.kind, b.bits) == (kind, bits)]:
                lines.append(f"  {bits:>2} bits  {_spans(some)}")
        if gone := layer_map.pruned(kind):
            lines.append(f"  pruned   {_spans(gone)}")
        for name, value in layer_map.notes.get("thresholds", {}).get(kind, {}).items():
            if value:
                lines.append(f"  {name} {value:.4g}")
    if output := layer_map.notes.get("pruned output"):
        lines.append(
            f"distance to the full output after pruning {output['distance']:.4g} "
            f"({output['reach']:.0%} of the way to another shape), IoU {output['iou']:.3f}"
        )
    if (predicted := layer_map.notes.get("predicted bytes")) is not None:
        lines.append(f"predicted file {predicted:,} bytes ({predicted / 2**20:.3f} MiB)")
    lines += [f"note: {line}" for line in layer_map.notes.get("assumed", ())]
    return "\n".join(lines)


def _spans(indices: Sequence[int]) -> str:
    """0-3, 5, 8-9"""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][-1] + 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    return ", ".join("-".join(map(str, span)) for span in spans)


def load_plan(path: str | Path) -> LayerMap:
    """A plan file; FormatError naming the file and the field that is wrong."""
    path = Path(path)
    try:
        return LayerMap.from_json(parse_json(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a plan file") from error
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: not a plan ({one_line(error)}); run `plan` again") from error


def from_options(
    path: str | Path,
    *,
    target_size: int | None = None,
    paper: bool = False,
    max_distance: float | None = None,
    taus: Mapping[str, float] | None = None,
) -> LayerMap:
    """What `vitapack plan` does: at most one of the ways, the automatic one by default."""
    ways = {
        "--target-size": target_size is not None,
        "--paper": paper,
        "--max-distance": max_distance is not None,
        "thresholds": bool(taus),
    }
    if len(asked := [name for name, used in ways.items() if used]) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; choose one")
    vitality = Vitality.load(path)
    if paper:
        variant = paper_variant(vitality.family, vitality.totals)
        layer_map = plan_paper(variant, family=vitality.family)
    elif target_size is not None:
        return plan_target_size(vitality, target_size)
    elif taus:
        layer_map = plan_thresholds(vitality, **dict[str, Any](taus))
    else:
        layer_map = plan_auto(vitality, max_distance=max_distance)
    predicted = predict_size(vitality, layer_map).total
    return replace(layer_map, notes=layer_map.notes | {"predicted bytes": predicted})


def resolve_plan(plan: str | Path | LayerMap, checkpoint: Checkpoint) -> LayerMap:
    """A layer map for one checkpoint: a plan file, or `paper`, `int8`, `int4`, `fp16`.

    Raises UserError for a plan of another family or other block counts.
    """
    totals = {
        kind: len(indices) for kind, indices in kept_blocks(checkpoint.config).items() if indices
    }
    uniform = {"int8": 8, "int4": 4, "fp16": 16}
    if isinstance(plan, str) and plan in uniform:
        return LayerMap.uniform(checkpoint.family, totals, uniform[plan])
    if plan == "paper":
        return plan_paper(paper_variant(checkpoint.family, totals), family=checkpoint.family)
    if isinstance(plan, str) and not Path(plan).exists():
        raise UserError(f"no plan {plan!r}: name a plan file, or {', '.join(uniform)} or paper")
    layer_map = plan if isinstance(plan, LayerMap) else load_plan(plan)
    if layer_map.family != checkpoint.family or layer_map.totals != totals:
        raise UserError(
            f"the plan is for {layer_map.family} with {_counts(layer_map.totals)}, the model is "
            f"{checkpoint.family} with {_counts(totals)}; make a plan from this model's vitality"
        )
    return layer_map


def _counts(totals: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {kind} blocks" for kind, count in totals.items())
