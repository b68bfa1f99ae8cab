"""The header of a packed file, read and checked without torch. The format is docs/format.md.

    header = read_header("model.safetensors")
    print(header.family, header.layer_map.how, header.sizes().total)

`read_header` reads only the header and trusts none of it: architecture, layer map and layouts
determine the exact table of tensors, and the file must hold exactly that table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vitapack.kernels.linear.layouts import LAYOUTS, W16, WeightLayout
from vitapack.runtime.choices import FLOATS, MODULATIONS
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.format.architecture import Architecture, architecture_from_json
from vitapack.runtime.format.checks import (
    expect,
    expect_choice,
    expect_keys,
    expect_object,
    is_text,
)
from vitapack.runtime.format.container import (
    Container,
    TensorInfo,
    describe,
    one_line,
    parse_json,
    read_container,
)
from vitapack.runtime.format.layermap import KINDS, LayerMap
from vitapack.runtime.format.schedules import SamplerDefaults, evaluation_times
from vitapack.runtime.format.sizes import SizeTable, size_table
from vitapack.runtime.format.tensors import model_tensors, plan_linears

FORMAT = 1
KEY = "vitapack"  # of __metadata__

STORAGES = ("embedded", "referenced", "none")
PARTS = {"shape_decoder": "vae", "conditioner": "conditioner"}  # field -> tensor prefix
MAX_NODES = 100_000
MAX_SCHEDULES = 256


@dataclass(frozen=True)
class PackedContent:
    """The fields of `__metadata__["vitapack"]`."""

    tool: str
    family: str
    variant: str
    network: Architecture
    source: dict[str, Any]
    layer_map: LayerMap
    linears: dict[str, str]  # linear -> layout id
    rest: str  # dtype of the unquantized tensors
    quantizer: str
    modulation: dict[str, Any]
    sampler: dict[str, Any]
    shape_decoder: dict[str, Any]
    conditioner: dict[str, Any]

    def dumps(self) -> str:
        """The JSON text: sorted keys, so equal content is equal bytes."""
        content = {name: getattr(self, name) for name in FIELDS}
        content["network"], content["layer_map"] = self.network.to_json(), self.layer_map.to_json()
        content["format"] = FORMAT
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


FIELDS = tuple(field.name for field in fields(PackedContent))


@dataclass(frozen=True)
class PackedHeader(PackedContent):
    """The checked header of a packed file. `tensors` are in file order."""

    path: Path
    size: int  # of the file, bytes
    data_start: int
    sha256: str  # of the content, as stated in the file (docs/format.md); see reader.verify
    tensors: dict[str, TensorInfo]

    def sizes(self) -> SizeTable:
        sizes = {name: info.nbytes for name, info in self.tensors.items()}
        return size_table(sizes, self.linears, self.data_start)

    def to_json(self) -> dict[str, Any]:
        """All fields of the header, the size table and the tensors, for `inspect --json`."""
        replaced = ("path", "network", "layer_map", "tensors")
        plain = {name: value for name, value in vars(self).items() if name not in replaced}
        tensors = {
            name: {"dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
            for name, info in self.tensors.items()
        }
        return {
            "file": str(self.path),
            "format": FORMAT,
            **plain,
            "network": self.network.to_json(),
            "layer_map": self.layer_map.to_json(),
            "sizes": self.sizes().to_json(),
            "tensors": tensors,
        }

    def layout(self, linear: str) -> WeightLayout:
        """The weight layout of a linear."""
        return LAYOUTS[self.linears.get(linear, W16.id)]

    def schedules(self) -> str:
        """The tables' schedules in words: "euler 20 steps, unipc 10 steps"."""
        return describe_schedules(self.modulation["schedules"])

    def nodes(self) -> list[float]:
        """The model times that the modulation tables hold, ascending."""
        return schedule_nodes(map(SamplerDefaults.from_json, self.modulation["schedules"]))


def describe_schedules(schedules: Iterable[Mapping[str, Any]]) -> str:
    words = []
    for schedule in schedules:
        shift = schedule.get("shift", 1.0)
        extra = f" shift {shift:g}" if shift != 1.0 else ""
        words.append(f"{schedule['name']} {schedule['steps']} steps{extra}")
    return ", ".join(words) or "no schedule"


def schedule_nodes(schedules: Iterable[SamplerDefaults]) -> list[float]:
    """The distinct model times of all schedules, ascending: the rows of the modulation tables."""
    return sorted({t for settings in schedules for t in evaluation_times(settings)})


def read_header(path: str | os.PathLike[str]) -> PackedHeader:
    """Reads and checks the header of a packed file.

    Only the header is read; `reader.verify` computes the content's sha256. Raises FormatError with
    one line that names the file and the error.
    """
    container = read_container(path)
    if KEY not in container.metadata:
        raise FormatError(
            f"{container.path}: a safetensors file, but not a packed one (no {KEY!r} in its "
            "metadata); make a packed file with `vitapack compress`"
        )
    try:
        data = parse_json(container.metadata[KEY])
        return _checked(container, expect_object("metadata", data))
    except (UserError, ValueError, TypeError) as error:
        raise FormatError(f"{container.path}: {one_line(error)}") from None


def _checked(container: Container, data: dict[str, Any]) -> PackedHeader:
    version = data.get("format")
    if type(version) is not int or version != FORMAT:
        raise ValueError(
            f"format version {one_line(version)[:20]!r}, this vitapack reads version {FORMAT}; "
            "install a vitapack that knows it or compress the model again"
        )
    expect_keys("metadata", data, ("format", *FIELDS))
    for name in ("tool", "family", "variant", "quantizer"):
        expect(f"{name}", data[name], is_text, "a short text")
    network = architecture_from_json(data["network"])
    layer_map = LayerMap.from_json(data["layer_map"])
    for kind in KINDS:
        if kind not in network.block_kinds:
            if layer_map.kept(kind):
                raise ValueError(
                    "the layer map keeps blocks of a kind that this network does not have"
                )
            continue
        kept, listed = list(layer_map.kept(kind)), list(network.blocks_by_kind()[kind])
        if kept != listed:
            raise ValueError(
                f"the layer map keeps {kind} blocks {_short(kept)}, "
                f"the network has {_short(listed)}"
            )
    expect_choice("rest", data["rest"], FLOATS)
    modulation = _modulation(data["modulation"])
    linears = _linears(data["linears"], network, layer_map, modulation["kind"])
    SamplerDefaults.from_json(data["sampler"])
    header = PackedHeader(
        path=container.path,
        size=container.size,
        data_start=container.data_start,
        sha256=container.metadata.get("sha256", ""),
        tensors=container.tensors,
        tool=data["tool"],
        family=data["family"],
        variant=data["variant"],
        network=network,
        source=_source("source", data["source"]),
        layer_map=layer_map,
        linears=linears,
        rest=data["rest"],
        quantizer=data["quantizer"],
        modulation=modulation,
        sampler=data["sampler"],
        shape_decoder=_reference("shape_decoder", data["shape_decoder"], container),
        conditioner=_reference("conditioner", data["conditioner"], container),
    )
    _check_tensors(header)
    return header


def _check_tensors(header: PackedHeader) -> None:
    expected = model_tensors(header.network, header.linears, header.rest, header.modulation)
    embedded = tuple(f"{prefix}." for prefix in PARTS.values())
    found = {name: info for name, info in header.tensors.items() if not name.startswith(embedded)}
    if missing := [name for name in expected if name not in found]:
        dtype, shape = expected[missing[0]]
        raise ValueError(
            f"tensor {missing[0]!r} is missing, expected {describe(dtype, shape)} "
            f"({len(missing)} missing in all)"
        )
    if extra := [name for name in found if name not in expected]:
        raise ValueError(
            f"tensor {extra[0]!r} does not belong to this network and layer map "
            f"({len(extra)} such in all)"
        )
    for name, info in found.items():
        if (info.dtype, info.shape) != expected[name]:
            raise ValueError(
                f"tensor {name!r}: expected {describe(*expected[name])}, "
                f"found {describe(info.dtype, info.shape)}"
            )


def _linears(
    data: Any, network: Architecture, layer_map: LayerMap, modulation: str
) -> dict[str, str]:
    expect_object("linears", data)
    for name, layout in data.items():
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise ValueError(
                f"linear {name[:80]!r}: unknown layout {one_line(layout)[:40]!r}; "
                f"this vitapack reads {', '.join(LAYOUTS)}"
            )
    expected = plan_linears(network, layer_map, modulation)
    for name in sorted(set(expected) | set(data)):
        if expected.get(name) != data.get(name):
            raise ValueError(
                f"linear {name[:80]!r}: the layer map and modulation kind require layout "
                f"{expected.get(name)}, found {data.get(name)}"
            )
    return data


def _modulation(data: Any) -> dict[str, Any]:
    expect_object("modulation", data)
    expect_keys("modulation", data, ("kind", "dtype", "guidance", "nodes", "schedules"))
    expect_choice("modulation kind", data["kind"], MODULATIONS)
    expect_choice("modulation dtype", data["dtype"], FLOATS)
    guidance = data["guidance"]
    expect(
        "modulation guidance",
        guidance,
        lambda v: v is None or (type(v) in (int, float) and abs(v) < 1e6),
        "a number or null",
    )
    tables = data["kind"] in ("table", "both")
    expect(
        "modulation nodes",
        data["nodes"],
        lambda v: type(v) is int and (1 <= v <= MAX_NODES if tables else v == 0),
        f"1..{MAX_NODES} for tables, else 0",
    )
    schedules = data["schedules"]
    expect(
        "modulation schedules",
        schedules,
        lambda v: isinstance(v, list) and len(v) <= MAX_SCHEDULES,
        f"a list of at most {MAX_SCHEDULES}",
    )
    times = schedule_nodes(SamplerDefaults.from_json(schedule) for schedule in schedules)
    if len(times) != data["nodes"]:
        raise ValueError(
            f"modulation: the schedules have {len(times)} distinct times, "
            f"the tables {data['nodes']} rows"
        )
    return data


def _reference(field: str, data: Any, container: Container) -> dict[str, Any]:
    expect_object(field, data)
    expect_keys(field, data, ("storage", "config", "source"))
    expect_choice(f"{field} storage", data["storage"], STORAGES)
    expect_object(f"{field} config", data["config"])
    if data["storage"] == "referenced":
        _source(f"{field} source", data["source"])
    elif data["source"] is not None:
        raise ValueError(f"{field}: a source is for referenced components only")
    prefix = f"{PARTS[field]}."
    held = any(name.startswith(prefix) for name in container.tensors)
    if held != (data["storage"] == "embedded"):
        raise ValueError(
            f"{field} is {data['storage']}, but the file holds "
            f"{'' if held else 'no '}tensors under {prefix!r}"
        )
    return data


def _source(label: str, data: Any) -> dict[str, Any]:
    expect_object(label, data)
    expect_keys(label, data, ("name", "sha256", "bytes"))
    expect(f"{label} name", data["name"], is_text, "a file name")
    digits = set("0123456789abcdef")
    expect(
        f"{label} sha256",
        data["sha256"],
        lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= digits,
        "64 hexadecimal digits",
    )
    expect(f"{label} bytes", data["bytes"], lambda v: type(v) is int and v >= 0, "a size")
    return data


def _short(values: list[int]) -> str:
    text = ", ".join(map(str, values[:12]))
    return f"[{text}{', ...' if len(values) > 12 else ''}]"
