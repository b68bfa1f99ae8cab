"""Writes the report, one HTML file: renders, meshes, vitality, sizes, metrics.

    write_report("report.html", ReportData(title="...", objects=(...), blocks=(...), ...))

The file is self-contained. Fields of `ReportData` other than the title may be empty; their sections
are then left out. Text is escaped; the same data gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitapack.compressor.evaluate.metrics import METRICS
from vitapack.compressor.report.render import Frame, frame_of, render
from vitapack.runtime.decode.mesh import Mesh
from vitapack.runtime.files import atomic_path

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class ReportObject:
    """One row: the input image, then a render and an interactive mesh per entry of `meshes`."""

    name: str
    image: Any = None  # PIL image, uint8 array (H, W, 1 | 3 | 4), path of an image file, or None
    # Column heading ("original", "compressed", "true shape") to mesh; None: no mesh.
    meshes: Mapping[str, Mesh | None] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)  # column heading -> line below it


@dataclass(frozen=True)
class Block:
    """One bar of the vitality chart."""

    kind: str  # "double", "single", ...: one panel each, in order of appearance
    index: int  # in the original model
    vitality: float
    low: float | None = None  # ends of the 95 % interval
    high: float | None = None
    bits: int | None = None  # of the kept block's weights; None: pruned


@dataclass(frozen=True)
class SizePart:
    """One line of the size table, in bytes; None if a file has no such section."""

    name: str  # "8-bit weights", "modulation tables", "shape decoder", ...
    original: int | None
    packed: int | None


@dataclass(frozen=True)
class MetricRow:
    """One comparison: `summary` is `metrics.evaluate_folders(...)["summary"]`."""

    name: str  # "compressed to original", "original to true shape", ...
    # Key of `metrics.METRICS` -> {"mean": float, "low": float, "high": float, ...}
    summary: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ReportData:
    """The contents of a report."""

    title: str
    lead: Sequence[str] = ()  # paragraphs under the title
    headline: Sequence[tuple[str, str]] = ()  # (figure, label): ("0.97", "mean V-IoU")
    objects: Sequence[ReportObject] = ()
    objects_note: str = ""
    blocks: Sequence[Block] = ()
    vitality_name: str = "EMD to the full model's output"
    vitality_floor: float | None = None  # distance between two samplings of one surface
    vitality_note: str = ""
    sizes: Sequence[SizePart] = ()
    sizes_note: str = ""
    metrics: Sequence[MetricRow] = ()
    metrics_note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    footer: str = ""


def write_report(
    path: str | Path, data: ReportData, *, picture: int = 320, max_faces: int = 60_000
) -> Path:
    """Writes the report atomically and returns its path.

    picture: side of the renders in pixels. max_faces: a mesh with more is embedded coarser
    (vertices clustered on a grid; the render always shows the whole mesh). 20,000 faces are about
    250 kB of HTML. Raises UserError if the file cannot be written.
    """
    path = Path(path)
    meshes: dict[str, dict[str, Any]] = {}
    sections = [
        _objects(data, picture, max_faces, meshes),
        _vitality(data),
        _sizes(data),
        _metrics(data),
        _settings(data),
    ]
    template = string.Template((ASSETS / "report.html").read_text("utf-8"))
    page = template.substitute(
        title=_text(data.title),
        lead="\n".join(f"<p>{_text(line)}</p>" for line in data.lead),
        headline=_headline(data),
        sections="\n".join(section for section in sections if section),
        footer=_text(data.footer or "Written by vitapack."),
        meshes=json.dumps(meshes, separators=(",", ":")),
        css=(ASSETS / "report.css").read_text("utf-8"),
        js=(ASSETS / "viewer.js").read_text("utf-8"),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")
    return path


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _headline(data: ReportData) -> str:
    cards = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(figure)}</dd></div>"
        for figure, label in data.headline
    )
    return f'<dl class="headline">{cards}</dl>' if cards else ""


# Renders and meshes


def _objects(
    data: ReportData, picture: int, max_faces: int, meshes: dict[str, dict[str, Any]]
) -> str:
    if not data.objects:
        return ""
    rows = []
    for item in data.objects:
        shown = [mesh for mesh in item.meshes.values() if mesh is not None and len(mesh.faces)]
        frame = frame_of(*shown)
        figures = []
        if item.image is not None:
            source = _png(_photo(item.image, picture))
            figures.append(
                f'<figure><div class="stage photo"><img src="{source}" '
                f'alt="input image of {_text(item.name)}"></div>'
                "<figcaption><b>input</b></figcaption></figure>"
            )
        for column, mesh in item.meshes.items():
            figures.append(_mesh_figure(item, column, mesh, frame, picture, max_faces, meshes))
        rows.append(
            f'<article class="object"><h3>{_text(item.name)}</h3>'
            f'<div class="views" style="--columns:{max(len(figures), 1)}">'
            f"{''.join(figures)}</div></article>"
        )
    note = data.objects_note or (
        "Drag a mesh to turn it, the others of its row follow; arrow keys turn it too, ctrl with "
        "the wheel or a pinch zooms, a double click goes back."
    )
    return f'<section><h2>Shapes</h2><p class="soft">{_text(note)}</p>{"".join(rows)}</section>'


def _mesh_figure(
    item: ReportObject,
    column: str,
    mesh: Mesh | None,
    frame: Frame,
    picture: int,
    max_faces: int,
    meshes: dict[str, dict[str, Any]],
) -> str:
    note = item.notes.get(column, "")
    caption = f"<figcaption><b>{_text(column)}</b> {_text(note)}</figcaption>"
    if mesh is None or not len(mesh.faces):
        stage = '<div class="stage"><div class="missing">no mesh</div></div>'
        return f"<figure>{stage}{caption}</figure>"
    key = f"m{len(meshes)}"
    meshes[key] = _embedded(mesh, frame, max_faces)
    source = _png(render(mesh, picture, frame=frame, background=None))
    stage = (
        f'<div class="stage" data-mesh="{key}"><img src="{source}" '
        f'alt="{_text(column)} mesh of {_text(item.name)}"></div>'
    )
    return f"<figure>{stage}{caption}</figure>"


def _embedded(mesh: Mesh, frame: Frame, max_faces: int) -> dict[str, Any]:
    """The mesh for the viewer, with its frame: positions in uint16 steps of the bounding box and
    indices, both base64."""
    mesh = _coarser(mesh, max_faces)
    low = mesh.vertices.min(axis=0).astype(np.float64)
    extent = np.maximum(mesh.vertices.max(axis=0) - low, 1e-9 * frame.radius)
    places = np.rint((mesh.vertices - low) / extent * 65535).astype("<u2")
    wide = len(places) > 65535
    return {
        "low": [round(float(x), 7) for x in low],
        "extent": [float(f"{x:.8g}") for x in extent],
        "centre": [round(x, 7) for x in frame.centre],
        "radius": float(f"{frame.radius:.8g}"),
        "wide": wide,
        "places": base64.b64encode(places.tobytes()).decode("ascii"),
        "faces": base64.b64encode(mesh.faces.astype("<u4" if wide else "<u2").tobytes()).decode(
            "ascii"
        ),
    }


def _coarser(mesh: Mesh, max_faces: int) -> Mesh:
    """Merges the vertices in each cell of the finest grid that leaves at most `max_faces` faces."""
    full = mesh
    low = full.vertices.min(axis=0)
    extent = float((full.vertices.max(axis=0) - low).max()) or 1.0
    cells = 512
    while len(mesh.faces) > max_faces and cells >= 8:
        cell = np.floor((full.vertices - low) / extent * cells).astype(np.int64)
        _, label = np.unique(cell, axis=0, return_inverse=True)
        label = label.reshape(-1)
        count = np.bincount(label)
        centre = [np.bincount(label, full.vertices[:, k]) / count for k in range(3)]
        faces = label[full.faces]
        a, b, c = faces.T
        faces = faces[(a != b) & (b != c) & (c != a)]
        mesh = replace(full, vertices=np.stack(centre, axis=1), faces=faces)
        cells = cells * 4 // 5
    used, index = np.unique(mesh.faces, return_inverse=True)
    return replace(mesh, vertices=mesh.vertices[used], faces=index.reshape(-1, 3))


def _photo(image: Any, size: int) -> Any:
    from PIL import Image

    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            image = opened.convert("RGBA")
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image).squeeze())
    image = image.convert("RGBA")
    image.thumbnail((2 * size, 2 * size), Image.Resampling.LANCZOS)
    return image


def _png(image: Any) -> str:
    from PIL import Image

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# Vitality


def _bits_class(bits: int | None) -> str:
    return "pruned" if bits is None else f"kept b{bits}"


def _vitality(data: ReportData) -> str:
    if not data.blocks:
        return ""
    kinds = list(dict.fromkeys(block.kind for block in data.blocks))
    top = max(max(b.vitality, b.high or 0.0) for b in data.blocks)
    top = max(top, data.vitality_floor or 0.0, 1e-12) * 1.05
    charts = "".join(
        _panel(kind, [b for b in data.blocks if b.kind == kind], top, data) for kind in kinds
    )
    seen = sorted({b.bits for b in data.blocks if b.bits is not None})
    keys = [f'<li><i class="{_bits_class(bits)}"></i>kept, {bits} bits</li>' for bits in seen]
    if any(b.bits is None for b in data.blocks):
        keys.append('<li><i class="pruned"></i>pruned</li>')
    if data.vitality_floor is not None:
        keys.append(f'<li><i class="line"></i>sampling floor {_number(data.vitality_floor)}</li>')
    note = f'<p class="soft">{_text(data.vitality_note)}</p>' if data.vitality_note else ""
    return (
        f'<section><h2>Vitality of the blocks</h2><p class="soft">{_text(data.vitality_name)} when '
        "a block is left out; whiskers are 95 % intervals, all panels have one scale.</p>"
        f'<ul class="key">{"".join(keys)}</ul>{charts}{note}</section>'
    )


def _panel(kind: str, blocks: Sequence[Block], top: float, data: ReportData) -> str:
    left, right, above, height, below = 52, 10, 26, 150, 34
    width = 1000
    step = min((width - left - right) / len(blocks), 90)
    bar = step * 0.68

    def y(value: float) -> float:
        return round(above + height * (1 - min(max(value / top, 0), 1)), 1)

    base = y(0)
    parts = [f'<text class="name" x="{left}" y="14">{_text(kind)} blocks</text>']
    for tick in _ticks(top):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>'
        )
    for place, block in enumerate(blocks):
        x = round(left + place * step + (step - bar) / 2, 1)
        middle = round(x + bar / 2, 1)
        state = "pruned" if block.bits is None else f"{block.bits} bits"
        interval = ""
        if block.low is not None and block.high is not None:
            interval = f", 95 % interval {_number(block.low)} to {_number(block.high)}"
        tip = f"{kind} block {block.index}: {_number(block.vitality)}{interval}; {state}"
        parts.append(
            f'<g><title>{_text(tip)}</title><rect class="{_bits_class(block.bits)}" x="{x}" '
            f'y="{y(block.vitality)}" width="{bar:.1f}" '
            f'height="{max(base - y(block.vitality), 0.8):.1f}" rx="2"/>'
        )
        if block.low is not None and block.high is not None:
            low, high = y(block.low), y(block.high)
            cap = min(bar / 5, 5)
            parts.append(
                f'<path class="whisker" fill="none" d="M{middle} {low}V{high}'
                f"M{middle - cap:.1f} {low}h{2 * cap:.1f}M{middle - cap:.1f} {high}"
                f'h{2 * cap:.1f}"/>'
            )
        label = "pruned" if block.bits is None and step > 44 else "×" if block.bits is None else ""
        parts.append(
            f'<text x="{middle}" y="{base + 14}" text-anchor="middle">{block.index}</text>'
            f'<text x="{middle}" y="{base + 28}" text-anchor="middle">'
            f"{label or f'{block.bits}b'}</text></g>"
        )
    if data.vitality_floor is not None:
        floor = y(data.vitality_floor)
        parts.append(
            f'<line class="floor" x1="{left}" x2="{width - right}" y1="{floor}" y2="{floor}"/>'
        )
    total = above + height + below
    return (
        f'<div class="scroll"><svg class="chart" viewBox="0 0 {width} {total}" role="img" '
        f'aria-label="vitality of the {_text(kind)} blocks">{"".join(parts)}</svg></div>'
    )


def _ticks(top: float) -> list[float]:
    """0 and two to five round values up to `top`."""
    size = 10.0 ** np.floor(np.log10(top))
    step = next(s * size for s in (0.1, 0.2, 0.5, 1.0, 2.0) if top / (s * size) < 6)
    return [float(f"{k * step:.6g}") for k in range(int(top / step) + 1)]


def _number(value: float) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3g}"


# Tables


def _sizes(data: ReportData) -> str:
    if not data.sizes:
        return ""
    columns = {
        "original": [row.original for row in data.sizes],
        "packed": [row.packed for row in data.sizes],
    }
    totals = {name: sum(value or 0 for value in values) for name, values in columns.items()}
    widest = max(*totals.values(), 1)
    bars = ""
    for name, values in columns.items():
        spans = "".join(
            f'<span class="s{k % 8}" style="width:{100 * value / widest:.3f}%" '
            f'title="{_text(data.sizes[k].name)}: {_bytes(value)}"></span>'
            for k, value in enumerate(values)
            if value
        )
        bars += f'<div class="soft">{name}: {_bytes(totals[name])}</div>'
        bars += f'<div class="stack">{spans}</div>'
    rows = "".join(
        f'<tr><td><span class="key"><span><i class="s{k % 8}"></i>{_text(part.name)}</span></span>'
        f"</td><td>{_bytes(part.original)}</td><td>{_bytes(part.packed)}</td>"
        f"<td>{_share(part.packed, totals['original'])}</td></tr>"
        for k, part in enumerate(data.sizes)
    )
    rows += (
        f'<tr class="total"><td>together</td><td>{_bytes(totals["original"])}</td>'
        f"<td>{_bytes(totals['packed'])}</td>"
        f"<td>{_share(totals['packed'], totals['original'])}</td></tr>"
    )
    note = f"{data.sizes_note} " if data.sizes_note else ""
    return (
        f'<section><h2>Size</h2>{bars}<div class="scroll"><table><caption>{_text(note)}1 MB is '
        "1,000,000 bytes.</caption><thead><tr><th>section</th><th>original</th><th>packed</th>"
        f"<th>of the original's total</th></tr></thead><tbody>{rows}</tbody></table>"
        "</div></section>"
    )


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return (
                f"{value / size:.3g} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
            )
    return f"{value} B"


def _share(value: int | None, total: int) -> str:
    return "–" if value is None or not total else f"{100 * value / total:.1f} %"


def _metrics(data: ReportData) -> str:
    if not data.metrics:
        return ""
    names = [
        name
        for name, metric in METRICS.items()
        if metric.column and any(name in row.summary for row in data.metrics)
    ]
    head = "".join(
        f"<th>{_text(METRICS[name].label)} {'↑' if METRICS[name].higher_is_better else '↓'}</th>"
        for name in names
    )
    rows = ""
    for row in data.metrics:
        cells = ""
        for name in names:
            entry = row.summary.get(name)
            if entry is None:
                cells += "<td>–</td>"
                continue
            interval = ""
            if entry.get("low") is not None and entry.get("high") is not None:
                interval = f"<small>{_number(entry['low'])} to {_number(entry['high'])}</small>"
            floor = row.summary.get(METRICS[name].floor)
            if floor is not None:
                interval += f"<small>floor {_number(floor['mean'])}</small>"
            cells += f"<td>{_number(entry['mean'])}{interval}</td>"
        rows += f"<tr><td>{_text(row.name)}</td>{cells}</tr>"
    terms = "".join(
        f"<dt>{_text(METRICS[name].label)}</dt><dd>{_text(METRICS[name].definition)}</dd>"
        for name in names
    )
    note = f"{data.metrics_note} " if data.metrics_note else ""
    return (
        f'<section><h2>Geometry</h2><div class="scroll"><table><caption>{_text(note)}Means over '
        "objects with their 95 % bootstrap intervals; an arrow points to the better side."
        f"</caption><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<details><summary>Definitions</summary>"
        f'<dl class="terms">{terms}</dl></details></section>'
    )


def _settings(data: ReportData) -> str:
    tables = ""
    for title, pairs in (("Settings", data.settings), ("Versions", data.versions)):
        if pairs:
            rows = "".join(
                f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>"
                for name, value in pairs.items()
            )
            tables += f'<h2>{title}</h2><table class="pairs"><tbody>{rows}</tbody></table>'
    return f"<section>{tables}</section>" if tables else ""
