"""docs/emd.md shows the figures that the benchmark recorded, and no others."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("emd_page", ROOT / "benchmarks" / "emd_page.py")
    assert spec
    assert spec.loader
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
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
