"""The CPU's pages are what their JSON says, and a stopped furniture run is taken up again."""

import json

from benchmarks.cpu import furniture as cpu_furniture
from benchmarks.cpu import page as cpu_page
from benchmarks.cpu import run as cpu


def test_the_pages_show_the_results():
    processors = [cpu.read(path) for path in sorted(cpu.RESULTS.glob("*.json"))]
    assert cpu_page.glance(processors) in cpu_page.PAGE.read_text()
    assert cpu_page.figures(processors) in cpu_page.ALL.read_text()


def test_each_processor_has_a_file_of_its_name():
    for path in cpu.RESULTS.glob("*.json"):
        assert cpu.read(path)["machine"]["file"] == path.stem
    assert cpu.machine()["file"]


def test_a_journal_is_read_up_to_where_it_was_cut(tmp_path):
    journal = tmp_path / "j.jsonl"
    assert cpu_furniture._read(journal) == {}
    rows = [{"plan": "int8", "number": n, "scores": {"a8 to a16": 0.5}} for n in (3, 4)]
    journal.write_text("\n".join(map(json.dumps, rows))[:-5])
    assert cpu_furniture._read(journal) == {("int8", 3): {"a8 to a16": 0.5}}
