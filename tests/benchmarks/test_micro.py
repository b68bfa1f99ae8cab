"""Micro-benchmarks run, and compare themselves with the last saved run that has them."""

import json
import subprocess
import sys

from benchmarks.micro.__main__ import ROOT, ratios, saved


def test_each_runs_once_untimed():
    command = [sys.executable, "-m", "benchmarks.micro", "--benchmark-disable", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for room in ("linear", "emd", "container", "grid", "sampler"):
        assert (ROOT / "benchmarks" / "micro" / f"bench_{room}.py").is_file()
    assert "ratio" not in done.stdout  # nothing was timed, so nothing was saved


def save(folder, number, **medians):
    benchmarks = [{"name": name, "stats": {"median": value}} for name, value in medians.items()]
    path = folder / "Linux" / f"{number:04d}_run.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


def test_ratios_are_to_the_last_run_that_has_the_benchmark(tmp_path):
    save(tmp_path, 1, linear=1.0, emd=4e-3)
    save(tmp_path, 2, linear=2e-3)
    now = save(tmp_path, 10, linear=1e-3, emd=5e-3, grid=1.0)
    runs = saved(tmp_path)
    assert runs[-1] == now
    lines = ratios(now, runs[:-1])
    assert [line.split()[0] for line in lines[1:]] == ["linear", "emd", "grid"]
    assert lines[1].endswith("1,000 us  0.50 (run 0002)")
    assert lines[2].endswith("5,000 us  1.25 (run 0001)")
    assert lines[3].endswith("1,000,000 us  -")
