"""Checks of untrusted JSON values.

Each `expect` function raises ValueError with the field's label, the expected and the found value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitapack.runtime.format.container import one_line

Check = tuple[Callable[[Any], bool], str]  # whether a value is valid, and the expectation in words


def expect_object(label: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{label}: expected an object, found {type(value).__name__}")
    return value


def expect_keys(label: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
    if missing := sorted(set(known) - set(data)):
        raise ValueError(f"{label}: missing {', '.join(missing)}")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{label}: unknown field {unknown[0][:60]!r}")


def expect(label: str, value: Any, good: Callable[[Any], bool], expected: str) -> None:
    if not good(value):
        raise ValueError(f"{label}: expected {expected}, found {one_line(repr(value))[:60]}")


def expect_choice(label: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{label} {one_line(repr(value))[:40]}: this vitapack knows {', '.join(known)}"
        )


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and (value.isprintable() or not value)


def is_indices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(type(v) is int and 0 <= v < 10_000 for v in value)
        and value == sorted(set(value))
    )


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 20


def is_flag(value: Any) -> bool:
    return type(value) is bool


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 and at most 1e9, which excludes NaN and infinity."""
    return type(value) in (int, float) and 0 < value <= 1e9
