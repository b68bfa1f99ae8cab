"""Predicts the size of a packed file from a vitality table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitapack.compressor.vitality.table import Vitality
from vitapack.runtime.format.container import lay_out
from vitapack.runtime.format.header import KEY, PackedContent, schedule_nodes
from vitapack.runtime.format.layermap import LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults
from vitapack.runtime.format.sizes import SizeTable, size_table
from vitapack.runtime.format.tensors import model_tensors, plan_linears

# Loss from a block's 4 bits relative to the loss from its absence. Measured on the first furniture
# model: all 12 blocks in 4 bits lose 0.03 to 0.09 of IoU together, leaving out one single block
# 0.10 to 0.20; in quadrature over the blocks that is 1/10 to 1/20.
FOUR_BIT_SHARE = 1 / 16


def predict_size(
    vitality: Vitality,
    layer_map: LayerMap,
    *,
    schedules: Sequence[SamplerDefaults] | None = None,
    modulation: str = "table",
) -> SizeTable:
    """Bytes of the packed network by section, exact except for the header's free texts.

    schedules: of the modulation tables (default: the schedule of the analysis). Embedded components
    are not included; `compress --dry-run` counts them.
    """
    if schedules is None:
        schedules = [SamplerDefaults.from_json(vitality.settings["sampler"])]
    if modulation not in ("table", "both"):
        schedules = []
    network = vitality.network.with_blocks({kind: layer_map.kept(kind) for kind in vitality.kinds})
    linears = plan_linears(network, layer_map, modulation)
    tables = {
        "kind": modulation,
        "dtype": "F16",
        "guidance": None,
        "nodes": len(schedule_nodes(schedules)),
        "schedules": [schedule.to_json() for schedule in schedules],
    }
    # The settings of the components are not known yet, and the notes must not change the size that
    # they state: 1 KiB each is more than any of them takes.
    component = {"storage": "referenced", "config": {"": " " * 1024}, "source": {}}
    layer_map = replace(layer_map, how="", notes={"": " " * 1024})
    source = {"name": vitality.model, "sha256": vitality.source_sha256, "bytes": 10**10}
    text = PackedContent(
        tool="vitapack 00.00.00", family=vitality.family, variant=" " * 32, network=network,
        source=source, layer_map=layer_map, linears=linears, rest="F16", quantizer="search",
        modulation=tables, sampler=vitality.settings["sampler"], shape_decoder=component,
        conditioner=component,
    ).dumps()  # fmt: skip
    layout = lay_out(model_tensors(network, linears, "F16", tables), {KEY: text})
    sizes = {name: info.nbytes for name, info in layout.tensors.items()}
    return size_table(sizes, linears, len(layout.header))
