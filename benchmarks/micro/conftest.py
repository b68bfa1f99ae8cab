"""The same numbers in every run, and torch on one thread: on a busy machine its threads wait longer
for each other than such small operations take. Linears and attention use all cores."""

from collections.abc import Iterator

import pytest
import torch

CORES = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _alike(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(CORES if request.module.__name__.endswith("linear") else 1)
    yield
    torch.set_num_threads(CORES)
