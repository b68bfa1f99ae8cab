"""The checks of options: what they take, and the one line that refuses the rest."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitapack.compressor.packing.quantizers import QUANTIZERS
from vitapack.runtime import choices
from vitapack.runtime.errors import FormatError, UserError
from vitapack.runtime.networks.modulation import MissingTime

WHOLE = {
    choices.seed: (0, 2**63 - 1),
    choices.at_least_one: (1, 2**31 - 1),
    choices.steps: (1, 1000),
    choices.resolution: (1, 2048),
}


@pytest.mark.parametrize("check", WHOLE, ids=lambda check: check.__name__)
@given(number=st.integers(-(2**70), 2**70) | st.integers(-3, 3000))
def test_a_whole_number_or_its_digits(check, number):
    low, high = WHOLE[check]
    for value in (number, str(number)):
        if low <= number <= high:
            assert check(value) == number
        else:
            with pytest.raises(UserError, match=f"^{re.escape(repr(value))}: expected a whole"):
                check(value)


@pytest.mark.parametrize("check", WHOLE, ids=lambda check: check.__name__)
@given(value=st.text() | st.floats() | st.booleans() | st.none() | st.lists(st.integers()))
def test_anything_else_is_one_line(check, value):
    if isinstance(value, str) and value.isdecimal():
        return
    with pytest.raises(UserError, match="expected a whole number") as caught:
        check(value, "it")
    assert str(caught.value).startswith(f"it {value!r}: expected")
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_long_digits():
    assert type(choices.seed(np.int64(7))) is int
    for digits in ("0" * 20 + "7", "9" * 5000):
        with pytest.raises(UserError, match="expected a whole number"):
            choices.seed(digits)


@given(value=st.floats() | st.integers() | st.text() | st.booleans() | st.none())
def test_guidance(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value < float("inf"):
        assert choices.guidance(value) == value
    else:
        with pytest.raises(UserError, match="expected a number of at least 0"):
            choices.guidance(value)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices(name):
    assert choices.device(name) == name


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "meta", None])
def test_other_devices(name):
    with pytest.raises(UserError, match=r"no device .*: expected auto, cpu, cuda or cuda:N"):
        choices.device(name)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("450MB", 450_000_000),
        ("0.5gib", 2**29),
        ("12 kB", 12_000),
        ("7B", 7),
        ("1e3MiB", 1000 << 20),
    ],
)
def test_sizes(text, count):
    assert choices.size_bytes(text) == count


@given(st.text())
def test_a_size_or_one_line(text):
    try:
        found = choices.size_bytes(text)
    except UserError as error:
        found = str(error)
    assert isinstance(found, int) or found == (
        f"{text!r}: expected a size such as 450MB or 0.45GiB"
    )


def test_lists():
    assert choices.counts("20,30") == [20, 30]
    assert choices.names("euler,unipc") == ["euler", "unipc"]
    with pytest.raises(UserError, match="'': expected a whole number"):
        choices.counts("20,")


def test_a_choice_is_refused_with_all_that_there_are():
    choices.check_choice("compute mode", "a8", choices.COMPUTES)
    choices.check_choice("encoder bits", 16, choices.ENCODER_BITS)
    with pytest.raises(UserError, match="no compute mode 'a9': choose one of a16, a8"):
        choices.check_choice("compute mode", "a9", choices.COMPUTES)
    with pytest.raises(UserError, match="no encoder bits 4: choose one of 8, 16"):
        choices.check_choice("encoder bits", 4, choices.ENCODER_BITS)


def test_every_named_quantizer_is_there():
    assert set(QUANTIZERS) == set(choices.QUANTIZERS)


def test_choices_and_progress_need_no_other_package():
    code = (
        "import sys, vitapack.runtime.choices, vitapack.runtime.progress;"
        "print(sorted({'torch', 'numpy', 'PIL', 'yaml'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_users_mistake_is_no_value_error():
    """So that `except ValueError` around a parser lets it through with its own message."""
    for kind in (FormatError, MissingTime):
        assert issubclass(kind, UserError)
        assert not issubclass(kind, ValueError)
