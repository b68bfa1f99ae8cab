"""Shared by all tests: where data lies, instruction sets, GPU tests that are skipped out loud."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitapack.kernels.linear import cpu

DATA = Path(__file__).parent / "data"

# Tiny tensors gain nothing from torch's threads, and on busy cores they wait 15 ms for each other
# where the work takes 0.01 ms: the compressor's tests took 180 s with two threads, 20 s with one.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(params=cpu.instruction_sets() if cpu.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn, in use while the test runs."""
    cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set("")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: compiled, not timed")
    for item in items:
        if item.get_closest_marker("gpu"):  # a keyword would match a folder called gpu too
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "needs a CUDA GPU" in str(report.longrepr)
    ]
    terminalreporter.write_line(f"GPU tests skipped on this machine: {len(skipped)}")
