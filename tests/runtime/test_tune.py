"""What `vitapack tune` measures, and what it says where it cannot."""

from pathlib import Path

import pytest
import torch

from vitapack.runtime.errors import UserError
from vitapack.runtime.tune import describe, shapes_of, tune_packed

GOLDEN = Path(__file__).parents[1] / "data" / "packed_v1.safetensors"


def test_the_shapes_are_those_of_the_file() -> None:
    shapes = shapes_of(GOLDEN)
    assert len(shapes) == len(set(shapes))
    assert {group for _, _, group in shapes} == {0, 32}  # its single block has 8 bits
    assert all(n > 0 and k > 0 for n, k, _ in shapes)


def test_without_a_gpu_it_is_one_plain_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="no CUDA GPU for 'cuda:0'"):
        tune_packed(GOLDEN, [512, 1370])


def test_the_summary_compares_with_the_default() -> None:
    row = {"how": "fused", "tile": "", "us": 50.0, "default_us": 60.0, "tried": 3}
    text = describe({"gpu": "X", "cache": "c.json", "choices": {"w8a8 rows 4 1x2 group 0": row}})
    assert "1.20x of the default" in text
