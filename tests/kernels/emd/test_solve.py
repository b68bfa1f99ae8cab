"""The CPU solver's certificate, taken apart by means that share no code with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from emd_clouds import diagonal, dual_bound, exact, hard_pairs, mean_distance

from vitapack.kernels.emd.solve import emd

GOLDEN = Path(__file__).parents[2] / "data" / "emd"
CASES = json.loads((GOLDEN / "index.json").read_text())
HARD = hard_pairs(200)
ROUNDING = 1e-12


def check(x: np.ndarray, y: np.ndarray, truth: float, *, gap: float, p: int = 1) -> None:
    """Permutation, honest distance, bound <= truth <= distance, gap met, bound from the prices."""
    found = emd(x, y, gap=gap, p=p, return_prices=True)
    d = diagonal(x, y)
    assert np.array_equal(np.sort(found.assignment), np.arange(len(x)))
    recomputed = mean_distance(x, y, found.assignment, p)
    assert found.distance == pytest.approx(recomputed, rel=1e-12, abs=1e-15 * d)
    assert found.lower_bound <= truth + ROUNDING * d
    assert found.distance >= truth - ROUNDING * d
    assert found.distance - found.lower_bound <= gap * max(found.distance, 1e-6 * d) + 1e-15 * d
    assert found.converged
    # The square root of p=2 magnifies rounding near 0, so bounds are compared as costs.
    by_hand = dual_bound(x, y, found.prices, p) ** p
    assert found.lower_bound**p <= by_hand + 1e-15 * d**p
    assert found.lower_bound**p >= by_hand - 1e-13 * max(d**p, float(np.abs(found.prices).max()))


@pytest.mark.parametrize("name", CASES)
def test_golden_case(name: str) -> None:
    case = np.load(GOLDEN / f"{name}.npz")
    check(case["x"], case["y"], float(case["emd"]), gap=1e-3)


@pytest.mark.parametrize("name", HARD)
def test_hard_cloud(name: str) -> None:
    x, y = HARD[name]
    truth = exact(x, y)
    for gap in (1e-2, 1e-6):
        check(x, y, truth, gap=gap)
    check(x, y, exact(x, y, 2), gap=1e-3, p=2)
