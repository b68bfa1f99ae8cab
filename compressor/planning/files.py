"""Reads and describes plans, and resolves those that users name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitapack.compressor.options import PlanOptions
from vitapack.compressor.planning.automatic import plan_auto
from vitapack.compressor.planning.layer_maps import Checkpoint
from vitapack.compressor.planning.paper import paper_variant, plan_paper
from vitapack.compressor.planning.sizes import predict_size
from vitapack.compressor.planning.target_size import plan_target_size
from vitapack.compressor.planning.thresholds import plan_thresholds
from vitapack.compressor.vitality.table import Vitality
from vitapack.kernels.linear.layouts import LAYOUTS, W16
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.container import one_line, parse_json
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.options import merged


def describe(layer_map: LayerMap) -> str:
    """The layer map as text: kept blocks by kind and bits, pruned blocks and thresholds."""
    count, total = len(layer_map.blocks), sum(layer_map.totals.values())
    lines = [f"{layer_map.family}, {layer_map.how or 'by hand'}: {count} of {total} blocks kept"]
    for kind, count in layer_map.totals.items():
        lines.append(f"{kind} blocks ({count})")
        for bits in sorted({block.bits for block in layer_map.blocks}, reverse=True):
            if kept := [b.index for b in layer_map.blocks if (b.kind, b.bits) == (kind, bits)]:
                lines.append(f"  {bits:>2} bits  {_spans(kept)}")
        if pruned := layer_map.pruned(kind):
            lines.append(f"  pruned   {_spans(pruned)}")
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
    """Indices as text, such as "0-3, 5, 8-9"."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][-1] + 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    return ", ".join("-".join(map(str, span)) for span in spans)


def load_plan(path: str | Path) -> LayerMap:
    """Reads a plan file.

    Raises UserError if it cannot be read, FormatError naming the file and the wrong field.
    """
    path = Path(path)
    try:
        return LayerMap.from_json(parse_json(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a plan file") from error
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: not a plan ({one_line(error)}); run `plan` again") from error


def from_options(path: str | Path, options: PlanOptions | None = None, **changes: Any) -> LayerMap:
    """Makes the plan that `vitapack plan` makes; `changes` are fields of the options."""
    options = merged(PlanOptions, options, changes)
    vitality = Vitality.load(path)
    if options.target_size is not None:
        return plan_target_size(vitality, options.target_size)
    if options.paper:
        variant = paper_variant(vitality.family, vitality.totals)
        layer_map = plan_paper(variant)
    elif options.tau or options.tau8:
        layer_map = plan_thresholds(vitality, options.tau, options.tau8)
    else:
        layer_map = plan_auto(vitality, max_distance=options.max_distance)
    predicted = predict_size(vitality, layer_map).total
    return replace(layer_map, notes=layer_map.notes | {"predicted bytes": predicted})


def resolve_plan(plan: str | Path | LayerMap, checkpoint: Checkpoint) -> LayerMap:
    """A layer map for one checkpoint: a plan file, or `paper`, `int8`, `int4`, `fp16`.

    Raises UserError for an unknown name, another family or other block counts.
    """
    totals = {
        kind: len(indices)
        for kind, indices in checkpoint.config.blocks_by_kind().items()
        if indices
    }
    uniform = {f"int{layout.bits}": layout.bits for layout in LAYOUTS.values() if layout.packed}
    uniform["fp16"] = W16.bits
    if isinstance(plan, str) and plan in uniform:
        return LayerMap.uniform(checkpoint.family, totals, uniform[plan])
    if plan == "paper":
        return plan_paper(paper_variant(checkpoint.family, totals))
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
