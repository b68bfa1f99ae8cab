"""Writes docs/emd.md's figures from benchmarks/results/emd.json; called by benchmarks.emd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import between, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "emd.md"


def table_line(row: dict[str, Any]) -> str:
    ours = row["solver"] == "vitapack"
    names = {"vitapack": "vitapack", "pot": "POT `ot.emd2`", "scipy": "scipy LSA"}
    requested, gap = (f"{row['gap']:.2%}", f"{row['certified_gap']:.3%}") if ours else ("", "exact")
    return (
        f"| {row['pair']} | {row['n']:,} | {names[row['solver']]} | {requested} | {gap} "
        f"| {abs(row['error']):.0e} | {row['seconds']:.4f} | {row['n_runs']} "
        f"| {row['times_pot']:.1f}x | {row['peak_mib']:.1f} |"
    )


def table_text(part: dict[str, Any]) -> str:
    exact_rows = [row for row in part["rows"] if "times_pot" in row]
    lines = [
        f"{on(part)}. CPU seconds of one thread, medians of n runs.",
        "",
        *table(
            "| pair | N | solver | gap set | certified | true error | CPU s | n | vs POT | MiB |",
            map(table_line, exact_rows),
        ),
    ]
    ratios = []
    for row in part["rows"]:
        if row.get("p") == 2:
            same = (row["pair"], row["n"], row["gap"])
            plain = next(r for r in exact_rows if (r["pair"], r["n"], r["gap"]) == same)
            ratios.append(f"{row['seconds'] / plain['seconds']:.2f} ({row['pair']}, {row['n']:,})")
    lines += ["", f"Time of p=2 relative to p=1, at gap 0.1 %: {', '.join(ratios)}."]
    return "\n".join(lines)


def hard_text(part: dict[str, Any]) -> str:
    slowest = max(part["rows"], key=lambda row: row["seconds"])
    return "\n".join(
        [
            f"{on(part)}. N={part['n']:,}, gap {part['gap']:.0%}, medians of {slowest['n_runs']} "
            f'runs; the slowest is "{slowest["cloud"]}" with {slowest["seconds"]:.2f} CPU s.',
            "",
            *table(
                "| clouds | CPU s | bids per point | phases | certified gap |",
                [
                    f"| {row['cloud']} | {row['seconds']:.3f} | {row['bids_a_point']:.0f} "
                    f"| {row['phases']} | {row['certified_gap']:.2%} |"
                    for row in part["rows"]
                ],
            ),
        ]
    )


def large_text(part: dict[str, Any]) -> str:
    rows = [
        f"{row['pair']} {row['seconds']:.1f} CPU s, {row['peak_mib']:.1f} MiB above the input "
        f"({row['peak_mib'] * 2**20 / row['n']:.0f} bytes per point)"
        for row in part["rows"]
    ]
    first = part["rows"][0]
    return f"{on(part)}. N={first['n']:,}, gap {first['gap']:.0%}, one run each: {'; '.join(rows)}."


def batch_text(part: dict[str, Any]) -> str:
    return (
        f"{on(part)}. {part['pairs']} pairs of N={part['n']:,}, gap {part['gap']:.1%}: two threads "
        f"take {part['wall_s_two_threads']:.2f} s, one {part['wall_s_one_thread']:.2f} s (wall, "
        f"medians of {part['repeats']} interleaved runs): **{part['speedup']:.2f}x**."
    )


def floor_text(part: dict[str, Any]) -> str:
    draws = part["rows"][0]["draws"]
    return "\n".join(
        [
            f"EMD of two samplings of one surface in [-1, 1], means of {draws} draws:",
            "",
            *table(
                "| surface | N | random | stratified | ratio |",
                [
                    f"| {row['shape']} | {row['n']:,} | {row['random']:.4f} "
                    f"| {row['stratified']:.4f} | {row['random'] / row['stratified']:.2f} |"
                    for row in part["rows"]
                ],
            ),
        ]
    )


def cuda_text(part: dict[str, Any]) -> str:
    """One row per kernel, one column of registers per architecture."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for entry in part["kernels"]:
        rows.setdefault(entry["kernel"], []).append(entry)
    names = [entry["arch"] for entry in next(iter(rows.values()))]
    return "\n".join(
        [
            f"nvcc {part['nvcc']}, {part['status']}. Registers per thread:",
            "",
            *table(
                f"| kernel | {' | '.join(names)} | stack | spilled | shared bytes per block |",
                [
                    f"| `{kernel}` | {' | '.join(str(e['registers']) for e in entries)} "
                    f"| {max(e['stack_bytes'] for e in entries)} "
                    f"| {max(e['spill_bytes'] for e in entries)} "
                    f"| {max(e['shared_bytes'] for e in entries)} |"
                    for kernel, entries in rows.items()
                ],
            ),
        ]
    )


def on(part: dict[str, Any]) -> str:
    machine = part["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['instruction_set']}"


def texts(report: dict[str, Any]) -> dict[str, str]:
    """Markdown by part, for the parts in the report."""
    makers = {
        "table": table_text,
        "hard": hard_text,
        "large": large_text,
        "batch": batch_text,
        "floor": floor_text,
        "cuda": cuda_text,
    }
    return {part: make(report[part]) for part, make in makers.items() if part in report}


def write(report: dict[str, Any]) -> None:
    """Writes each part's text between its two markers in docs/emd.md."""
    page = PAGE.read_text()
    for part, text in texts(report).items():
        page = between(page, f"<!-- {part} -->\n", f"<!-- end of {part} -->", f"{text}\n")
    PAGE.write_text(page)
