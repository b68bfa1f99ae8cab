"""docs/cpu.md is what its JSON says, and a stopped furniture run is taken up again."""

import json

from benchmarks import cpu, cpu_furniture, cpu_page


def test_the_page_shows_the_results():
    results = json.loads(cpu.RESULTS.read_text())
    assert cpu_page.figures(results) in cpu_page.PAGE.read_text()


def test_a_journal_is_read_up_to_where_it_was_cut(tmp_path):
    journal = tmp_path / "j.jsonl"
    assert cpu_furniture._read(journal) == {}
    rows = [{"plan": "int8", "number": n, "scores": {"a8 to a16": 0.5}} for n in (3, 4)]
    journal.write_text("\n".join(map(json.dumps, rows))[:-5])
    assert cpu_furniture._read(journal) == {("int8", 3): {"a8 to a16": 0.5}}
