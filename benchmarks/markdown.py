"""Markdown shared by all generated pages: tables, and text between a page's markers.

table("| model | GiB |", [f"| {name} | {size:.3f} |" for name, size in sizes])
"""

from __future__ import annotations

from collections.abc import Iterable


def table(head: str, rows: Iterable[str]) -> list[str]:
    """The lines of a Markdown table.

    Raises:
        ValueError: a row's number of cells differs from the head's.
    """
    columns, body = head.count("|") - 1, list(rows)
    if odd := [row for row in body if row.count("|") != columns + 1]:
        raise ValueError(f"expected {columns} cells as in {head!r}, found {odd[0]!r}")
    return [head, "|" + " --- |" * columns, *body]


def between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` between two markers, in place of the text there.

    Raises:
        ValueError: a marker is missing.
    """
    head, opened, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"the page lacks {begin!r} or {end!r}")
    return f"{head}{begin}{text}{end}{tail}"
