"""What every page made from results needs: tables, and figures put between a page's marks.

table("| model | GiB |", [f"| {name} | {size:.3f} |" for name, size in sizes])
"""

from __future__ import annotations

from collections.abc import Iterable


def table(head: str, rows: Iterable[str]) -> list[str]:
    """The lines of a Markdown table; ValueError where a row has another number of cells."""
    columns, found = head.count("|") - 1, list(rows)
    if odd := [row for row in found if row.count("|") != columns + 1]:
        raise ValueError(f"expected {columns} cells as in {head!r}, found {odd[0]!r}")
    return [head, "|" + " --- |" * columns, *found]


def between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` in place of what stands between two marks; ValueError without them."""
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page lacks {begin!r} or {end!r}")
    return f"{head}{begin}{text}{end}{tail}"
