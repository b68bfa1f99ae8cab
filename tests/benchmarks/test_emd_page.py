"""docs/emd.md shows the figures that the benchmark recorded, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.emd import page

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = page.PAGE.read_text()
    copy = tmp_path / "emd.md"
    copy.write_text(committed)
    monkeypatch.setattr(page, "PAGE", copy)
    report = json.loads((ROOT / "benchmarks" / "results" / "emd.json").read_text())
    page.write(report)
    assert copy.read_text() == committed
    report["batch"]["speedup"] = 0.5
    page.write(report)
    assert "**0.50x**" in copy.read_text()
