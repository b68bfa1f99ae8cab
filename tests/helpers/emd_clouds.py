"""Point clouds that are hard on an assignment solver, and a reference that trusts no solver."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

Pair = tuple[np.ndarray, np.ndarray]


def exact(x: np.ndarray, y: np.ndarray, p: int = 1) -> float:
    """The distance by scipy's assignment solver, in float64."""
    cost = cdist(x.astype(np.float64), y.astype(np.float64)) ** p
    return float(cost[linear_sum_assignment(cost)].mean() ** (1 / p))


def mean_distance(x: np.ndarray, y: np.ndarray, assignment: np.ndarray, p: int = 1) -> float:
    apart = np.linalg.norm(x.astype(np.float64) - y.astype(np.float64)[assignment], axis=1)
    return float((apart**p).mean() ** (1 / p))


def diagonal(x: np.ndarray, y: np.ndarray) -> float:
    both = np.concatenate([x, y]).astype(np.float64)
    return float(np.linalg.norm(both.max(axis=0) - both.min(axis=0)))


def dual_bound(x: np.ndarray, y: np.ndarray, prices: np.ndarray, p: int = 1) -> float:
    """The bound that anyone can take from the prices, by plain numpy."""
    cost = cdist(x.astype(np.float64), y.astype(np.float64)) ** p
    value = (cost + prices).min(axis=1).mean() - prices.mean()
    return float(max(0.0, value) ** (1 / p))


def hard_pairs(n: int, seed: int = 0) -> dict[str, Pair]:
    """name -> (x, y), float32 (n, 3): every kind of cloud that broke or slowed some solver."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
    unit_x = x / np.linalg.norm(x, axis=1, keepdims=True)
    unit_y = y / np.linalg.norm(y, axis=1, keepdims=True)
    centres, few = rng.normal(size=(5, 3)), rng.random((max(2, n // 50), 3))
    many_first = rng.choice(5, n, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    many_last = rng.choice(5, n, p=[0.1, 0.1, 0.1, 0.1, 0.6])
    two = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    line, axis = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 0.0]])
    side = int(np.ceil(n ** (1 / 3)))
    steps = [np.arange(side)] * 3
    lattice = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)[:n] / side
    shuffled = lattice[rng.permutation(n)]
    outliers = 1e4 * rng.normal(size=(max(1, n // 100), 3))

    def with_outliers(cloud: np.ndarray) -> np.ndarray:
        return np.concatenate([outliers, cloud[len(outliers) :]])

    pairs = {
        "clusters of unequal mass": (
            centres[many_first] + 0.02 * x,
            centres[many_last] + 0.02 * y,
        ),
        "few points repeated": (
            few[rng.integers(0, len(few), n)],
            rng.random((len(few), 3))[rng.integers(0, len(few), n)],
        ),
        "the same few points": (
            few[rng.integers(0, len(few), n)],
            few[rng.integers(0, len(few), n)],
        ),
        "two points, 1/2 and 1/4": (
            two[(np.arange(n) < n // 2).astype(int)],
            two[(np.arange(n) < n // 4).astype(int)],
        ),
        "two points at random": (two[rng.integers(0, 2, n)], two[rng.integers(0, 2, n)]),
        "collinear": (rng.random((n, 1)) * line, rng.random((n, 1)) * line),
        "on an axis, squeezed": (rng.random((n, 1)) * axis, rng.random((n, 1)) ** 2 * axis),
        "crossed lines": (rng.random((n, 1)) * axis, rng.random((n, 1)) * axis[:, [1, 0, 2]]),
        "lattice, half a step": (lattice, shuffled + 0.5 / side),
        "lattice, one step": (lattice, shuffled + axis / side),
        "lattice shuffled": (lattice, shuffled),
        "outliers shared": (with_outliers(x), with_outliers(y)),
        "outliers on one side": (x, with_outliers(y)),
        "one outlier shared": (np.r_[[[1e4] * 3], x[1:]], np.r_[[[1e4] * 3], y[1:]]),
        "scale 1e6": (x * 1e6, y * 1e6),
        "scale 1e-6": (x * 1e-6, y * 1e-6),
        "offset 1e3": (x + 1e3, y + 1e3),
        "translated": (x, x[rng.permutation(n)] + np.array([0.1, 0.2, 0.3])),
        "translated far": (x, y + np.array([10.0, 20.0, 30.0])),
        "identical": (x, x[rng.permutation(n)]),
        "nearly identical": (x, x[rng.permutation(n)] + 1e-5 * y),
        "three times as large": (x, 3 * y),
        "sphere and its centre": (unit_x, np.zeros((n, 3))),
        "concentric spheres": (unit_x, 2 * unit_y),
        "parallel squares": (
            np.c_[rng.random((n, 2)), np.zeros(n)],
            np.c_[rng.random((n, 2)), np.ones(n)],
        ),
        "heavy tails": (rng.standard_cauchy((n, 3)), rng.standard_cauchy((n, 3))),
    }
    return {name: (a.astype(np.float32), b.astype(np.float32)) for name, (a, b) in pairs.items()}
