"""The inline PTX of the Triton kernels, executed as it stands over all byte patterns."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ptx_evaluator import run

kernels = pytest.importorskip("vitapack.kernels.linear.triton_gemm", exc_type=ImportError)


def words(columns: list[np.ndarray]) -> np.ndarray:
    """Four byte columns to words, first column in the lowest byte."""
    return np.stack(columns, -1).astype(np.uint8).view(np.uint32)[..., 0]


def every_byte_in_every_place() -> np.ndarray:
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 256, (4, 4 * 256))
    for place in range(4):
        columns[place, 256 * place : 256 * place + 256] = np.arange(256)
    return words(list(columns))


def halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two output words to four fp16 values each, (n, 4)."""
    return np.stack([low, high], -1).view(np.float16)


def test_int8_to_fp16_is_exact() -> None:
    w = every_byte_in_every_place()
    out = run(kernels.W8_TO_F16.value, 2, [w])
    assert np.array_equal(halves(*out), w[:, None].view(np.int8).astype(np.float16))


@pytest.mark.parametrize("high", [False, True])
def test_int4_unpacks_exactly_for_every_word_and_group(high: bool) -> None:
    """All s and z, all triples of neighbouring codes that a file may hold, in every place."""
    rng = np.random.default_rng(1)
    to_f16 = kernels.W4_HIGH_TO_F16 if high else kernels.W4_LOW_TO_F16
    to_s8 = kernels.W4_HIGH_TO_S8 if high else kernels.W4_LOW_TO_S8
    count = 0
    for s in range(1, 17):
        for z in range(16):
            codes = np.arange(16)
            codes = codes[np.abs(s * (codes - z)) <= 127]
            q = np.stack(np.meshgrid(codes, codes, codes), -1).reshape(-1, 3)
            q = np.concatenate([q, rng.choice(codes, (len(q), 1))], 1)
            q = np.concatenate([np.roll(q, place, 1) for place in range(4)])
            other = rng.integers(0, 16, q.shape)  # the other nibbles, of inputs 32 apart
            packed = q << 4 | other if high else other << 4 | q
            w = words(list(packed.T))
            c = ((128 - s * z) * 0x01010101) % 2**32
            groups = [np.full(w.shape, s)] * 4 + [np.full(w.shape, c)] * 4
            expected = s * (q - z)
            (bytes_,) = run(to_s8.value, 1, [w, *groups])
            assert np.array_equal(bytes_[:, None].view(np.int8), expected)
            out = run(to_f16.value, 2, [w, *groups])
            assert np.array_equal(halves(*out), expected.astype(np.float16))
            count += len(w)
    assert count > 1_500_000


def test_the_evaluator_refuses_what_it_does_not_know() -> None:
    w = np.zeros(1, np.uint32)
    with pytest.raises(KeyError):
        run("add.u32 $0, $1, $1;", 1, [w])
    with pytest.raises(ValueError, match="not declared"):
        run("mov.b32 t, $1;", 1, [w])


def test_split_words_are_found() -> None:
    good = "// words %r1 %r1 %r1 %r1 ; %r2 %r2 %r2 %r2\n"
    kernels.check_words(good)
    with pytest.raises(RuntimeError, match="splits an int4 word"):
        kernels.check_words(good + "// words %r1 %r1 %r3 %r1 ; %r2 %r2 %r2 %r2\n")
