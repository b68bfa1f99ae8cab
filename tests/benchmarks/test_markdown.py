"""The helper that all pages share."""

import pytest

from benchmarks.markdown import between, table


def test_table():
    lines = table("| a | b |", [f"| {i} | {i * i} |" for i in (1, 2)])
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 1 |", "| 2 | 4 |"]
    with pytest.raises(ValueError, match="expected 2 cells"):
        table("| a | b |", ["| 1 |"])


def test_between():
    assert between("x <a> old </a> y", "<a>", "</a>", "new") == "x <a>new</a> y"
    with pytest.raises(ValueError, match="lacks"):
        between("x <a> y", "<a>", "</a>", "new")
