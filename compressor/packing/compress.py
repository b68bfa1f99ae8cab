"""Compresses an original checkpoint to a packed file, as a layer map says.

    sizes = compress(open_checkpoint("Hunyuan3D-2mini"), layer_map, "model.safetensors")

The file is laid out from shapes alone (`--dry-run` stops there and shows the exact size), then
filled one linear at a time: memory peaks at about one layer for checkpoints of any size. An
interrupted run continues with the first unfinished tensor. Equal inputs give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitapack
from vitapack.compressor.options import CompressOptions
from vitapack.compressor.packing.modulation_tables import ModulationTables, stored
from vitapack.compressor.packing.quantizers import (
    QUANTIZERS,
    Quantizer,
    check_finite,
    one_thread,
)
from vitapack.compressor.packing.resumable import partial_file
from vitapack.kernels.linear.layouts import LAYOUTS, W8, W16, WeightLayout
from vitapack.runtime.condition.dinov2 import is_packable
from vitapack.runtime.errors import UserError
from vitapack.runtime.families.checkpoint import Checkpoint
from vitapack.runtime.format.architecture import (
    Architecture,
    Linear,
)
from vitapack.runtime.format.container import ITEM_BYTES, Layout, lay_out
from vitapack.runtime.format.header import (
    KEY,
    PARTS,
    PackedContent,
    schedule_nodes,
)
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.reader import torch_dtype
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.format.sizes import SizeTable, size_table
from vitapack.runtime.format.tensors import model_tensors, plan_linears
from vitapack.runtime.options import merged
from vitapack.runtime.progress import Control

# Components are embedded by default up to this total size: those of the furniture model are, while
# DINOv2-giant (2.2 GB) is only referenced.
EMBED_BELOW = 64 << 20


@dataclass(frozen=True)
class Plan:
    """The contents of a packed file that are known before a weight is read."""

    network: Architecture
    linears: dict[str, str]
    modulation: dict[str, Any]
    nodes: list[float]
    rest: str
    embedded: tuple[str, ...]  # components whose tensors are stored in the file
    layout: Layout

    def sizes(self) -> SizeTable:
        sizes = {name: info.nbytes for name, info in self.layout.tensors.items()}
        return size_table(sizes, self.linears, len(self.layout.header))


def compress(
    checkpoint: Checkpoint,
    layer_map: LayerMap,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    dry_run: bool = False,
    control: Control | None = None,
    **changes: Any,
) -> SizeTable:
    """Writes the packed file and returns its sizes. `changes` are fields of the options.

    `dry_run`: nothing is written. After an interruption or cancellation, the same call continues.
    Raises UserError for a layer map of another network, NaN or infinite weights, a full disk.
    """
    options = merged(CompressOptions, options, changes)
    out = Path(out)
    if out.is_dir():
        raise UserError(
            f"{out} is a folder: name the file to write, such as {out}/model.safetensors"
        )
    plan = make_plan(checkpoint, layer_map, options, hashed=not dry_run)
    if dry_run:
        return plan.sizes()
    control = control or Control()
    quantizer = QUANTIZERS[options.quantizer]()
    quantizer.prepare(checkpoint, None)
    jobs = list(_jobs(checkpoint, plan, quantizer))
    total, done = sum(job.weights for job in jobs), 0
    with one_thread(), partial_file(out, plan.layout) as file:
        for job in jobs:
            control.step("compress", done, total)
            if not file.kept.issuperset(job.names):
                for name, tensor in job.make().items():
                    if name not in file.kept:
                        file.put(name, as_bytes(tensor, plan.layout.tensors[name].dtype, name))
            done += job.weights
        file.publish()
    control.report("compress", total, total)
    return plan.sizes()


def family_schedules(
    sampler: SamplerDefaults, steps: Sequence[int] | None, samplers: Sequence[str] | None
) -> list[SamplerDefaults]:
    """Schedules of all samplers with all step counts; other settings are the family's."""
    return [
        replace(sampler, name=name, steps=count)
        for name in samplers or [sampler.name]
        for count in steps or [sampler.steps]
    ]


def make_plan(
    checkpoint: Checkpoint,
    layer_map: LayerMap,
    options: CompressOptions | None = None,
    *,
    hashed: bool = True,
) -> Plan:
    """Lays out the file. `hashed`: read the whole source for its sha256 (else 64 zeros)."""
    options = options or CompressOptions()
    modulation, rest, embed = options.modulation, options.rest, options.embed
    schedules = options.schedules
    if schedules is None:
        schedules = family_schedules(checkpoint.sampler, options.steps, options.samplers)
    network = pruned_config(checkpoint, layer_map)
    linears = plan_linears(network, layer_map, modulation)
    tables = modulation in ("table", "both")
    nodes = schedule_nodes(schedules) if tables else []
    sampler = checkpoint.sampler
    if tables and not nodes:
        raise UserError("modulation tables need at least one step to serve: give step counts")
    if modulation == "table" and sampler not in schedules:
        sampler = schedules[0]  # the file's default must be one that its tables can serve
    modulation_json = {
        "kind": modulation,
        "dtype": options.table_dtype,
        "guidance": checkpoint.sampler.guidance
        if checkpoint.config.embeds_guidance and tables
        else None,
        "nodes": len(nodes),
        "schedules": [schedule.to_json() for schedule in schedules] if tables else [],
    }
    tensors = model_tensors(network, linears, rest, modulation_json)
    parts = {part: _part_specs(checkpoint, part, options.encoder_bits) for part in PARTS}
    if embed is None:
        sizes = (_nbytes(spec) for specs in parts.values() for spec in specs.values())
        embed = sum(sizes) <= EMBED_BELOW
    source = checkpoint.source(hashed)
    references, embedded = {}, []
    for part, specs in parts.items():
        storage = "none" if not specs else "embedded" if embed else "referenced"
        references[part] = {
            "storage": storage,
            "config": checkpoint.part_config(part),
            "source": source if storage == "referenced" else None,
        }
        if storage == "embedded":
            tensors |= specs
            embedded.append(part)
    text = PackedContent(
        tool=f"vitapack {vitapack.__version__}",
        family=checkpoint.family,
        variant=checkpoint.variant,
        network=network,
        source=source,
        layer_map=layer_map,
        linears=linears,
        rest=rest,
        quantizer=options.quantizer,
        modulation=modulation_json,
        sampler=sampler.to_json(),
        shape_decoder=references["shape_decoder"],
        conditioner=references["conditioner"],
    ).dumps()
    layout = lay_out(tensors, {KEY: text})
    return Plan(network, linears, modulation_json, nodes, rest, tuple(embedded), layout)


def pruned_config(checkpoint: Checkpoint, layer_map: LayerMap) -> Architecture:
    """The pruned network's hyper-parameters. Raises UserError if the map is for another network."""
    actual = {kind: len(indices) for kind, indices in checkpoint.config.blocks_by_kind().items()}
    mapped = {kind: count for kind, count in layer_map.totals.items() if count}
    if mapped != {kind: count for kind, count in actual.items() if count}:
        raise UserError(
            f"the layer map is for a network of {_counts(mapped)}, "
            f"{checkpoint.path} ({checkpoint.variant}) has {_counts(actual)}"
        )
    return checkpoint.config.with_blocks({kind: layer_map.kept(kind) for kind in actual})


@dataclass(frozen=True)
class Job:
    """Tensors that are made together, usually those of one linear."""

    names: tuple[str, ...]
    weights: int  # weights read for it: the unit of progress
    make: Callable[[], dict[str, Tensor]]


def _jobs(checkpoint: Checkpoint, plan: Plan, quantizer: Quantizer) -> Iterator[Job]:
    placed = plan.layout.tensors
    tables: list[ModulationTables] = []  # computed when first needed, then kept

    def layout_of(name: str) -> WeightLayout:
        return LAYOUTS[plan.linears.get(name, W16.id)]

    def owned(name: str) -> tuple[str, ...]:
        weight = layout_of(name).stored(f"model.{name}.weight", 0, 0)
        every = (f"model.{name}.table", *weight, f"model.{name}.bias")
        return tuple(full for full in every if full in placed)

    def linear(name: str, shape: Linear, names: tuple[str, ...]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if f"model.{name}.table" in names:
            if not tables:
                tables.append(
                    ModulationTables(
                        checkpoint.config,
                        checkpoint.tensor,
                        plan.nodes,
                        plan.modulation["guidance"],
                    )
                )
            dtype = torch_dtype(plan.modulation["dtype"])
            tensors["table"] = stored(tables[0].rows(name), dtype, f"{name}.table")
        if any(f"model.{name}.weight" in full for full in names):
            weight = _fetch(checkpoint, f"{name}.weight", (shape.out, shape.inputs))
            tensors |= pack(weight, "weight", layout_of(name), quantizer, f"{name}.weight")
        if f"model.{name}.bias" in names:
            tensors["bias"] = _fetch(checkpoint, f"{name}.bias", (shape.out,))
        return {f"model.{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    def norm(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {f"model.{name}": _fetch(checkpoint, name, shape)}

    def embedded(part: str, full: str, name: str) -> dict[str, Tensor]:
        layout = W16 if full in placed else W8
        return pack(checkpoint.part_tensor(part, name), full, layout, quantizer, name)

    if plan.nodes:
        yield Job(
            ("modulation.t",),
            0,
            lambda: {"modulation.t": torch.tensor(plan.nodes, dtype=torch.float64)},
        )
    for name, shape in plan.network.linears().items():
        if names := owned(name):
            yield Job(names, shape.out * shape.inputs, partial(linear, name, shape, names))
    for name, norm_shape in plan.network.norms().items():
        yield Job((f"model.{name}",), math.prod(norm_shape), partial(norm, name, norm_shape))
    for part in plan.embedded:
        for name, (_, part_shape) in checkpoint.part_shapes(part).items():
            full = f"{PARTS[part]}.{name}"
            held = (full,) if full in placed else tuple(f"{full}.{suffix}" for suffix in W8.names)
            yield Job(held, math.prod(part_shape), partial(embedded, part, full, name))


def pack(
    weight: Tensor, stored: str, layout: WeightLayout, quantizer: Quantizer, name: str
) -> dict[str, Tensor]:
    """One weight's tensors in a layout, named `stored` in the file; `name` is for messages."""
    if not layout.packed:
        return {stored: weight}
    tensors = quantizer.quantize(name, weight, layout).tensors
    return {f"{stored}.{suffix}": tensor for suffix, tensor in tensors.items()}


def as_bytes(tensor: Tensor, dtype: str, name: str) -> memoryview:
    """The tensor's bytes in a file dtype. Raises UserError for NaN, inf and overflow."""
    if tensor.is_floating_point():
        check_finite(tensor, name)
        wide, tensor = tensor, tensor.to(torch_dtype(dtype))
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name}: a value of {float(wide.abs().max()):.3g} does not fit {dtype}; "
                f"{'compress with rest F32' if name.startswith('model.') else 'do not embed it'}"
            )
    elif tensor.dtype != torch_dtype(dtype):
        raise ValueError(f"{name}: {tensor.dtype} cannot be stored as {dtype}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _fetch(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = checkpoint.tensor(name)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    return tensor


def _part_specs(
    checkpoint: Checkpoint, part: str, encoder_bits: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a component as stored in the file: floats in fp16, integers unchanged, and with
    `encoder_bits` 8 the linears of a DINOv2 in 8 bits."""
    floats = {"F64", "F32", "F16", "BF16"}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in checkpoint.part_shapes(part).items():
        full = f"{PARTS[part]}.{name}"
        if encoder_bits == 8 and part == "conditioner" and is_packable(name, shape):
            specs |= W8.stored(full, shape[0], shape[1])
        else:
            specs[full] = ("F16" if dtype in floats else dtype, shape)
    return specs


def _nbytes(spec: tuple[str, tuple[int, ...]]) -> int:
    count = ITEM_BYTES[spec[0]]
    for size in spec[1]:
        count *= size
    return count


def _counts(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {kind} blocks" for kind, count in counts.items()) or "no blocks"
