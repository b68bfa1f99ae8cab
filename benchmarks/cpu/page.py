"""Writes the tables of docs/cpu.md and docs/cpu_figures.md from benchmarks/results/cpu/*.json.

Called by benchmarks.cpu.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.cpu import guided as cpu_guided
from benchmarks.cpu import trellis as cpu_trellis
from benchmarks.markdown import between, table

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, ALL = DOCS / "cpu.md", DOCS / "cpu_figures.md"
BEGIN, END = "<!-- figures: python -m benchmarks.cpu -->", "<!-- end of figures -->"
Results = dict[str, Any]


def write(processors: list[Results]) -> None:
    """Replaces the text between the markers of both pages."""
    for page, text in ((PAGE, glance(processors)), (ALL, figures(processors))):
        page.write_text(between(page.read_text(), BEGIN, END, f"\n\n{text}\n\n"))


def glance(processors: list[Results]) -> str:
    """The table of docs/cpu.md: targets and ratios for each completely measured processor."""
    processors = [results for results in processors if set(COMPARED) <= set(results)]
    rows: dict[str, list[str]] = {}
    for results in processors:
        for title, value in ratios(results).items():
            rows.setdefault(title, []).append(value)
    names = " | ".join(f"{r['machine']['processor']}, {r['machine']['threads']} cores"
                       for r in processors)  # fmt: skip
    return lines(
        f"| | target | {names} |",
        [f"| {title} | {AIMS[title]} | {' | '.join(values)} |" for title, values in rows.items()],
    )


COMPARED = ("dit", "guided", "errors", "breakdown", "peers", "memory", "gemm", "attention")
AIMS = {
    "2mini forward pass, 512 latents: W8A8 / torch bf16": "0.30",
    "W4A8 / torch bf16": "0.30",
    "3072 latents: W8A8 / torch bf16": "",
    "guided step, 512 latents: W8A8 / torch bf16 as the reference implementation runs it": "",
    "W8A8 / fastest other library": "0.60",
    "linears in the forward pass, share of int8 peak": "70%",
    "the slowest of them": "",
    "single linears, 128 rows or more, lowest share": "70%",
    "single attention, lowest share": "40%",
    "single linears: lowest speedup of W8A8 over torch bf16": "1.8",
    "relative error of the forward pass to float32: W8A8": "2%",
    "W4A8 / exact float group scales": "1.05",
    "peak memory / sum of weights, scratch and output": "1.35",
    "seconds to load": "1",
}


def ratios(results: Results) -> dict[str, str]:
    dit, rows = results["dit"], results["gemm"]["rows"]
    short = dit["512"]["seconds"]
    steps = results["guided"]["512"]["seconds"]
    peers = {
        name: found["seconds"]["ours"] / found["seconds"]["peer"]
        for name, found in results["peers"].items()
        if "seconds" in found
    }
    best = max(peers, key=lambda name: peers[name])
    breakdown, peak = results["breakdown"], results["breakdown"]["peak_gops"]
    inside = {
        name: (work, breakdown["w8a8"]["seconds"][name])
        for name, work in breakdown["operations"].items()
        if name != "attention"
    }
    together = [sum(column) for column in zip(*inside.values(), strict=True)]
    least = min(inside, key=lambda name: inside[name][0] / inside[name][1])
    alone = results["gemm"]
    attention = results["attention"]
    errors, memory = results["errors"], results["memory"].values()
    values = (
        f"{short['w8a8'] / short['bf16']:.3f}",
        f"{short['w4a8'] / short['bf16']:.3f}",
        f"{dit['3072']['seconds']['w8a8'] / dit['3072']['seconds']['bf16']:.3f}",
        f"{steps['w8a8'] / steps['bf16']:.3f}",
        f"{peers[best]:.2f} ({best})",
        f"{together[0] / together[1] / peak:.0%}",
        f"{inside[least][0] / inside[least][1] / peak:.0%} ({least})",
        f"{min(row['gops']['w8a8'] / peak_of(row, alone) for row in rows):.0%}",
        f"{min(row['gops'] / peak_of(row, attention) for row in attention['rows']):.0%}",
        f"{min(row['gops']['w8a8'] / row['gops']['bf16'] for row in rows):.2f}",
        f"{errors['w8a8']:.2%}",
        f"{errors['w4a8'] / errors['w4 float groups']:.3f}",
        f"{max(part['ratio'] for part in memory):.2f}",
        f"{max(part['load_seconds'] for part in memory):.2f}",
    )
    return dict(zip(AIMS, values, strict=True))


def peak_of(row: dict[str, Any], part: dict[str, Any]) -> float:
    """Measured int8 peak in GOP/s, interleaved with the row; for Zen 4 the part's best."""
    return float(row.get("peak_gops") or part["peak_gops"])


def figures(processors: list[Results]) -> str:
    return "\n\n".join(map(section, processors))


def section(results: Results) -> str:
    m = results["machine"]
    blocks = [
        f"## {m['processor']}, {m['threads']} threads\n\n{m['instruction_set']}, torch "
        f"{m['torch']}. The rows of a table ran interleaved, round by round; medians."
    ]
    blocks += [writer(results[part]) for part, writer in WRITERS.items() if part in results]
    return "\n\n".join(blocks)


def lines(head: str, rows: list[str]) -> str:
    return "\n".join(table(head, rows))


def dit_text(part: dict[str, Any]) -> str:
    rows = []
    for latents, found in sorted(part.items(), key=lambda item: int(item[0])):
        seconds = found["seconds"]
        for name in ("bf16", "w8a8", "w4a8"):
            title = {"bf16": "torch bf16, eager, SDPA", "w8a8": "W8A8", "w4a8": "W4A8"}[name]
            share = ""
            if name != "bf16":
                total = sum(found["operations"].values())
                share = f"{total / seconds[name] / found['peak_gops']:.0%}"
            rows.append(
                f"| {latents} + {found['condition']} | {title} | {seconds[name]:.2f} "
                f"| {seconds[name] / seconds['bf16']:.3f} | {share} | {found['n_runs']} |"
            )
    return "### A forward pass of Hunyuan3D-2mini\n\nBatch 2, random weights.\n\n" + lines(
        "| latents + condition | | seconds | of bf16 | of int8 peak | n |", rows
    )


def errors_text(part: dict[str, float]) -> str:
    names = {
        "bf16": "torch bf16",
        "w8a8": "W8A8",
        "w8 alone": "int8 weights, float activations",
        "w4a8": "W4A8",
        "w4 alone": "int4 weights, float activations",
        "w4 float groups": "the same int4 codes, exact float group scales, float activations",
    }
    rows = [f"| {title} | {part[name]:.2%} |" for name, title in names.items()]
    ratio = part["w4a8"] / part["w4 float groups"]
    return (
        "### Relative error of the forward pass to float32, 512 latents\n\n"
        + lines("| | relative error |", rows)
        + f"\n\nW4A8 has {ratio:.3f} times the error of exact float group scales."
    )


def breakdown_text(part: dict[str, Any]) -> str:
    rows = []
    eight, four = part["w8a8"], part["w4a8"]
    for name, seconds in sorted(eight["seconds"].items(), key=lambda item: -item[1]):
        work = part["operations"].get(name)
        share = f"{work / seconds / part['peak_gops']:.0%}" if work else ""
        rows.append(
            f"| {name} | {seconds:.3f} | {seconds / eight['whole']:.1%} | {share} "
            f"| {four['seconds'][name]:.3f} |"
        )
    rows.append(f"| whole | {eight['whole']:.3f} | | | {four['whole']:.3f} |")
    outside = "the modulation row and Python"
    if "first and last linears" not in eight["seconds"]:
        outside += ", here also embeddings and final layer, which torch ran"
    return (
        f"### Time of a forward pass by operation, {part['latents']} latents\n\nSeconds summed "
        "over threads, divided by their number. Waiting: for other threads at the end of a phase. "
        f"Outside: {outside}. Mean of {part['n_runs']}.\n\n"
        + lines("| | W8A8, s | | of int8 peak | W4A8, s |", rows)
    )


def peers_text(part: dict[str, Any]) -> str:
    rows = []
    for name, found in part.items():
        if "seconds" not in found:
            rows.append(f"| {name} | {found['status']} | | | | |")
            continue
        peer, ours = found["seconds"]["peer"], found["seconds"]["ours"]
        rows.append(
            f"| {name} | {peer:.2f} | {ours:.2f} | {ours / peer:.2f} | {found['error']:.2%} "
            f"| {found['n_runs']} |"
        )
    text = "### Other libraries, 512 + 1370 tokens\n\n" + lines(
        "| | seconds | W8A8 in the same run | W8A8 / other | error to fp32 | n |", rows
    )
    if any(name.startswith("ggml") for name in part):
        text += "\n\nggml: GGUF's formats in ggml-python, built with GGML_LLAMAFILE=ON."
    return text


def memory_text(part: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {f['file_bytes'] / 1e6:.0f} | {f['weight_bytes'] / 1e6:.0f} "
        f"| {f['scratch_bytes'] / 1e6:.0f} | {f['peak_bytes'] / 1e6:.0f} | {f['ratio']:.2f} "
        f"| {f['load_seconds']:.2f} |"
        for name, f in part.items()
    ]
    return (
        "### Memory and loading\n\nMB in addition to the interpreter with torch and the inputs; "
        "counted: weights + scratch + output.\n\n"
        + lines("| | file | weights | scratch | peak | peak / counted | load, s |", rows)
    )


def gemm_text(part: dict[str, Any]) -> str:
    rows, peaks = [], []
    for row in part["rows"]:
        gops, peak = row["gops"], peak_of(row, part)
        peaks.append(peak)
        rows.append(
            f"| {row['m']} | {row['k']} x {row['n']} | {gops['bf16']:.0f} | {gops['w8a8']:.0f} "
            f"| {gops['w8a8'] / peak:.0%} | {gops['w8a8'] / gops['bf16']:.2f} "
            f"| {gops['w4a8']:.0f} | {gops['w4a8'] / peak:.0%} | {gops['w8a16']:.0f} |"
        )
    return (
        f"### Single linears, GOP/s\n\nFrom bf16 to bf16, quantization included; int8 peak "
        f"{statistics.median(peaks):.0f} GOP/s, n = {part['n_runs']}.\n\n"
        + lines(
            "| M | K x N | torch bf16 | W8A8 | of peak | x bf16 | W4A8 | of peak | W8A16 |", rows
        )
    )


def attention_text(part: dict[str, Any]) -> str:
    rows = [
        f"| {r['tokens']} | {r['milliseconds']['bf16']:.0f} | {r['milliseconds']['int8']:.0f} "
        f"| {r['milliseconds']['bf16'] / r['milliseconds']['int8']:.2f} "
        f"| {r['gops'] / peak_of(r, part):.0%} | {r['error']['int8']:.2%} "
        f"| {r['error']['bf16']:.2%} |"
        for r in part["rows"]
    ]
    return f"### Single attention\n\nBatch 2, 16 heads of 64, n = {part['n_runs']}.\n\n" + lines(
        "| tokens | SDPA bf16, ms | int8, ms | x bf16 | of int8 peak | error | error of bf16 |",
        rows,
    )


def furniture_text(part: dict[str, Any]) -> str:
    names = ["a8 to a16", "a16 to truth", "a8 to truth"]
    rows = [
        f"| {plan} | "
        + " | ".join(
            f"{f[n]['mean']:.3f} ({f[n]['interval'][0]:.3f} to {f[n]['interval'][1]:.3f})"
            for n in names
        )
        + " |"
        for plan, f in part.items()
    ]
    count = next(iter(part.values()))["a8 to a16"]["n"]
    return (
        f"### The bundled model\n\nV-IoU from the same noise on {count} unseen views, mean and "
        "95 % interval.\n\n" + lines("| plan | " + " | ".join(names) + " |", rows)
    )


WRITERS = {
    "dit": dit_text,
    "guided": cpu_guided.text,
    "errors": errors_text,
    "breakdown": breakdown_text,
    "peers": peers_text,
    "memory": memory_text,
    "gemm": gemm_text,
    "attention": attention_text,
    "furniture": furniture_text,
    "trellis": cpu_trellis.text,
}
