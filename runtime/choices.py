"""Choices and limits of all options, and the functions that check values against them.

    check_choice("compute mode", "a9", COMPUTES)    # UserError: no compute mode 'a9': choose ...
    seed("17")                                      # 17

Used by the command line, option objects, file readers and servers. Values may be numbers or, as on
a command line or in a URL query, strings of digits. Imports no other package, since the command
line builds its parsers from here first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vitapack.runtime.errors import UserError

COMPUTES = ("a16", "a8")  # float activations, int8 activations
MEMORY_MODES = ("resident", "lean")  # keep networks loaded, or evict each after its phase
SAMPLERS = ("euler", "consistency", "unipc")
VIEWS = ("front", "left", "back", "right")  # of multi-view models; the position is the view's index
MESH_FORMATS = ("glb", "obj", "ply", "stl")
METRICS = ("emd", "chamfer")  # distances that vitality can use
MODULATIONS = ("table", "int8", "both", "kept")  # kept: unquantized, fp16
FLOATS = ("F16", "F32")  # dtypes of unquantized tensors in a packed file
QUANTIZERS = ("rtn", "search")
ENCODER_BITS = (8, 16)  # bits of the image encoder's linears
TRAINED_BLOCKS = ("min-vital", "max-vital", "all")  # chosen within each block kind
ALIGNMENTS = ("rigid", "similarity", "none")
NETWORKS = ("dit", "decoder", "conditioner")  # networks of a model

MAX_SEED = (1 << 63) - 1  # limit of torch's generators
MAX_COUNT = (1 << 31) - 1
MAX_STEPS = 1000  # number of times on which every family was trained
MAX_RESOLUTION = 2048  # cells per side of a grid


def check_choice(what: str, value: Any, known: Sequence[Any]) -> None:
    """Raises UserError unless `value` is one of the `known` ones."""
    if value not in known:
        raise UserError(f"no {what} {value!r}: choose one of {', '.join(map(str, known))}")


def whole(value: Any, low: int, high: int, name: str = "") -> int:
    """Returns `value` if it is a whole number from `low` to `high`. Raises UserError otherwise."""
    return _within(_integer(value), low, high, value, name)


def at_least_one(value: int | str, name: str = "") -> int:
    """A count, 1 to 2^31 - 1. Raises UserError otherwise."""
    return _within(_read(value), 1, MAX_COUNT, value, name, "a whole number of at least 1")


def seed(value: int | str, name: str = "") -> int:
    """A seed, 0 to 2^63 - 1. Raises UserError otherwise."""
    return _within(_read(value), 0, MAX_SEED, value, name, "a whole number, 0 to 2^63 - 1")


def steps(value: int | str, name: str = "") -> int:
    """A number of denoising steps, 1 to 1000. Raises UserError otherwise."""
    return _within(_read(value), 1, MAX_STEPS, value, name)


def resolution(value: int | str, name: str = "") -> int:
    """Cells per side of a grid, 1 to 2048. Raises UserError otherwise."""
    return _within(_read(value), 1, MAX_RESOLUTION, value, name)


def is_whole(value: Any, low: int, high: int = MAX_COUNT) -> bool:
    """Whether `value` is a whole number from `low` to `high`; strings are not."""
    number = _integer(value)
    return number is not None and low <= number <= high


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def flag(value: Any, name: str) -> bool:
    """A boolean. Raises UserError otherwise, also for the string "false"."""
    if not isinstance(value, bool):
        raise UserError(f"{name} {value!r}: expected true or false")
    return value


def guidance(value: float, name: str = "") -> float:
    """A guidance scale, finite and at least 0. Raises UserError otherwise."""
    if not (is_number(value) and value >= 0):
        raise UserError(f"{name} {value!r}: expected a number of at least 0".lstrip())
    return value


def distance(value: float, name: str = "") -> float:
    """A distance between shapes, finite and at least 0. Raises UserError otherwise."""
    if not (is_number(value) and value >= 0):
        raise UserError(f"{name} {value!r}: expected a distance of at least 0".lstrip())
    return value


def device(value: str) -> str:
    """The name of a device; `engines.device` checks that it exists. Raises UserError otherwise."""
    kind, _, index = str(value).partition(":")
    # Rejects "cpu:0", which would be treated as a GPU, and torch devices without support here.
    if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise UserError(f"no device {value!r}: expected auto, cpu, cuda or cuda:N")
    return value


def counts(text: str) -> list[int]:
    """Parses counts such as "20,30". Raises UserError for anything else."""
    return [at_least_one(count) for count in text.split(",")]


def names(text: str) -> list[str]:
    """Parses names such as "euler,unipc"."""
    return text.split(",")


def size_bytes(text: str) -> int:
    """Parses a size in bytes such as "450MB" or "0.45GiB". Raises UserError for anything else."""
    units = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit in sorted(units, key=len, reverse=True):
        if text.upper().endswith(unit):
            with suppress(ValueError, OverflowError):
                return int(float(text[: -len(unit)]) * units[unit])
            break
    raise UserError(f"{text!r}: expected a size such as 450MB or 0.45GiB")


def _within(
    number: int | None, low: int, high: int, value: Any, name: str, expected: str = ""
) -> int:
    if number is None or not low <= number <= high:
        expected = expected or f"a whole number from {low} to {high}"
        raise UserError(f"{name} {value!r}: expected {expected}".lstrip())
    return number


def _integer(value: Any) -> int | None:
    """The value of a Python or numpy integer; None for anything else, booleans included."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    return None


def _read(value: Any) -> int | None:
    """The value of an integer, or of a string of at most 20 decimal digits; None otherwise."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) <= 20 else None
    return _integer(value)
