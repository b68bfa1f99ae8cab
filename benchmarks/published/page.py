"""Writes docs/published.md from results/published.json; called by benchmarks.published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.published import memory as published_memory
from benchmarks.published import paper_tables
from benchmarks.published.paper_tables import MODELS
from vitapack.runtime.files import atomic_path

ENCODERS = {"hunyuan3d-2.0": "DINOv2-giant", "step1x-3d": "DINOv2-large with registers"}
PHASES = ("condition", "denoise", "decode")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "published.md"


def gib(count: float) -> str:
    return f"{count / 2**30:.3f}"


def write(data: dict[str, Any], page: Path | None = None) -> None:
    """Writes the page; docs/published.md by default."""
    machine = data["machine"]
    maps = data.get("maps", {})
    lines = [
        "# The published models at full size",
        "",
        "Random weights in the released layouts (`vitapack random-checkpoint`): sizes, operations",
        "and memory are real, the meshes are meaningless. Written by",
        f"`python -m benchmarks.published` on {machine['cores']} cores of {machine['cpu']}, torch "
        f"{machine['torch']},",
        "shared with other processes: seconds are upper bounds.",
        "",
        *paper_tables.lines(data.get("tables", {}), data.get("gpu", {})),
        *maps_lines(maps, data.get("sizes", {})),
        "## Compression, from disk to disk",
        "",
        "Peak of the whole process, and the peak in addition to Python with torch imported.",
        "",
        *table(
            "| model | plan | source GB | seconds | GB/s | peak GB | beyond torch GB |",
            [
                f"| {name} | {plan} | {row['source_bytes'] / 1e9:.2f} | {entry['seconds']:.0f} | "
                f"{entry['gigabytes_per_second']:.3f} | {entry['peak'] / 1e9:.2f} | "
                f"{(entry['peak'] - entry['base']) / 1e9:.2f} |"
                for name, row in maps.items()
                for plan, entry in row["maps"].items()
            ],
        ),
        "",
    ]
    if encoders := data.get("encoders"):
        lines += encoder_lines(encoders)
    ran = data.get("generations", {})
    if memory := data.get("memory"):
        lines += published_memory.lines(memory, ran)
    if ran:
        lines += generation_lines(ran)
    if grids := data.get("grids"):
        lines += grid_lines(grids)
    for name, found in data.get("bench", {}).items():
        lines += bench_lines(name, found)
    with atomic_path(page or PAGE) as part:
        part.write_text("\n".join(lines))


def maps_lines(found: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found.items():
        exact = {plan: gib(count) for plan, count in sizes.get(name, {}).items()}
        rows.append(
            f"| {name} | {gib(row['fp16_bytes'])} | {row['steps']} | "
            f"{MODELS[name].rows['adaptive'].gib:g} | "
            f"**{gib(row['maps']['paper']['file_bytes'])}** | {exact.get('int8', '')} | "
            f"{exact.get('int4', '')} |"
        )
    return [
        "## The paper's layer maps",
        "",
        "Every linear of a kept block in 8 or 4 bits, modulation as exact fp16 tables for the",
        "given steps. GiB; `paper`: the size that the paper states for the same layer map in its",
        "format.",
        "",
        *table("| model | fp16 | steps | paper | ours | int8, unpruned | int4, unpruned |", rows),
        "",
        "The paper publishes only in part which blocks it prunes. Assumptions:",
        "",
        *(f"- {name}: {text}" for name, row in found.items() for text in row["assumed"]),
        "",
    ]


def encoder_lines(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in found.items():
        for form, entry in row["forms"].items():
            compared = "cosine_mean" in entry
            cells = (
                f"{entry['cosine_mean']:.6f} | {entry['cosine_min']:.6f} | "
                f"{entry['relative_error']:.4f}"
                if compared
                else "1 | 1 | 0"
            )
            rows.append(
                f"| {ENCODERS[name]} | {form} | {cells} | {entry['predicted'] / 1e9:.2f} | "
                f"{entry['peak'] / 1e9:.2f} | {(entry['peak'] - entry['base']) / 1e9:.2f} |"
            )
    versions = {e["transformers"] for row in found.values() for e in row["forms"].values()}
    counts = {row["images"] for row in found.values()}
    return [
        "## Image encoders in 8 bits",
        "",
        "Each condition token compared with the fp32 one, by",
        "`python -m benchmarks.published.encoders run`:",
        f"transformers {', '.join(sorted(versions))}, images: {max(counts)}, 1,370 tokens each.",
        "Random weights lack the outliers of trained ones. int8: packed linears, activations in",
        "fp32. GB: weights, and the peak of a process that encodes an image, n = 1.",
        "",
        *table(
            "| encoder | form | cosine, mean | lowest | relative error | weights | peak | "
            "beyond torch |",
            rows,
        ),
        "",
    ]


def generation_lines(ran: dict[str, Any]) -> list[str]:
    rows = []
    for row in ran.values():
        held = [row["bytes"][phase] for phase in PHASES]
        cells = [f"{gigabytes(h['predicted'])} / {gigabytes(h['peak'])}" for h in held]
        peak = max(h["peak"] for h in held)
        nodes, queries = (row["resolution"] + 1) ** 3, row["queries"]
        seconds = " + ".join(f"{row['seconds'][phase]:.0f}" for phase in PHASES)
        rows.append(
            f"| {row['model']} | {row['compute']} | {row['steps']} | {row['resolution']} | "
            f"{' | '.join(cells)} | {gigabytes(peak)} | "
            f"{gigabytes(peak - row['generate']['base'])} | {query_cell(queries, nodes)} | "
            f"{seconds} |"
        )
    return [
        "## Image to mesh on the CPU, one network in memory at a time",
        "",
        "The paper's layer map, packed, encoder in 8 bits, guidance in two passes, few steps,",
        "n = 1. GB of the whole process: predicted before the run / peak; seconds by phase. A grid",
        "of 64 cells per side is evaluated densely.",
        "The random decoder's surface is smooth (`random-checkpoint` damps its high frequencies)",
        "and about as large as an object's.",
        "",
        *table(
            "| model | compute | steps | grid | condition | denoise | decode | process "
            "| beyond torch | queries | s |",
            rows,
        ),
        "",
    ]


def query_cell(queries: int | None, nodes: int) -> str:
    """Queries, compared with the grid's nodes; queries None: the decoder has no field."""
    if queries is None:
        return ""
    return f"{queries:,} ({'dense' if queries == nodes else f'{nodes / queries:.1f}x fewer'})"


def sameness(row: dict[str, Any]) -> str:
    if row["identical"]:
        return "identical"
    if row["same_faces"]:
        return f"same faces, vertices within {row['farthest_vertex']:.0e}"
    return "not the same"


def grid_lines(grids: dict[str, Any]) -> list[str]:
    rows = []
    for row in grids.values():
        full, part = row["methods"]["dense"], row["methods"]["coarse to fine"]
        rows.append(
            f"| {row['kind']}, {row['name']} | {row['resolution']} | {full['queries']:,} | "
            f"{part['queries']:,} ({full['queries'] / part['queries']:.1f}x fewer) | "
            f"{full['seconds']:.1f} | {part['seconds']:.1f} | {row['signs_that_differ']} | "
            f"{sameness(row)} | {row['pieces']} | "
            f"{row['faces']:,} |"
        )
    return [
        "## Coarse-to-fine evaluation of the grid, compared with dense evaluation",
        "",
        "By `python -m benchmarks.published.grids`: the bundled model's shapes from unseen images,",
        "interpolated between their nodes (`interpolated`), or as a small ShapeVAE decoder fitted",
        "to each (`fitted`). Meshes before cleaning. Coarse to fine can miss a whole piece that is",
        "smaller than a coarse cell and hardly raises the coarse nodes around it.",
        "",
        *table(
            "| field | grid | queries, dense | queries, coarse to fine | s, dense "
            "| s, coarse to fine | nodes of another sign | meshes | pieces | faces |",
            rows,
        ),
        "",
    ]


def gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def bench_lines(name: str, found: dict[str, Any]) -> list[str]:
    base = found["steps"][0]["median_seconds"]
    rows = [
        f"| {row['name']} | {row['guidance']} | {gib(row['bytes'])} | "
        f"{row['flops']['total'] / 1e12:.3f} | "
        f"{row['median_seconds']:.2f} | {row['p90_seconds']:.2f} | {row['n']} | "
        f"{row['median_seconds'] / base:.2f} | {row['tflops_per_second']:.3f} | "
        f"{gigabytes(row['memory']['predicted'])} / {gigabytes(row['memory']['peak'])} |"
        for row in found["steps"]
    ]
    return [
        f"## `vitapack bench` on {name}, plan {found['plan']}, and on its original",
        "",
        f"One process, {found['threads']} threads, one network after the other: a guided step,",
        f"{found['latents'][0]} latents, {found['cond_tokens']} condition tokens, medians. As one "
        "batch of two, as the reference",
        "implementations run it, or in two passes, the unconditional one on a single token that",
        "represents all (exact). GB of the process: predicted / peak.",
        "",
        *table(
            "| network | guidance | GiB | TFLOP | s | p90 | n | x packed | TFLOP/s | GB |", rows
        ),
        "",
        *phases_lines([row for row in found["phases"] if "skipped" not in row]),
    ]


def phases_lines(ran: list[dict[str, Any]]) -> list[str]:
    """`bench`'s generation of one mesh by each network."""
    if not ran:
        return []
    rows = [
        f"| {row['name']} | {phase} | {row['seconds'][phase]:.2f} | "
        f"{gigabytes(held['predicted'])} / {gigabytes(held['peak'])} |"
        for row in ran
        for phase in PHASES
        if (held := row["bytes"].get(phase))
    ]
    stopped = {f"{row['name']} gave no mesh: {row['stopped']}." for row in ran if row["stopped"]}
    return [
        f"One image to a mesh, one network in memory at a time, {ran[0]['steps']} steps, grid "
        f"{ran[0]['resolution']}, n = 1.",
        "The original's image encoder is in float32; for the packed file it is quantized to 8 bits",
        "while it is read. Seconds include loading.",
        "",
        *table("| network | phase | s | GB |", rows),
        "",
        *(line for text in sorted(stopped) for line in (text, "")),
    ]
