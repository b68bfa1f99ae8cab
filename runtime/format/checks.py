"""Checks of untrusted JSON values: each raises ValueError naming the field, found and expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitapack.runtime.format.container import one_line

Check = tuple[Callable[[Any], bool], str]  # whether a value is good, and what was expected


def expect_object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, found {type(value).__name__}")
    return value


def expect_keys(what: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
    if missing := sorted(set(known) - set(data)):
        raise ValueError(f"{what}: missing {', '.join(missing)}")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{what}: unknown field {unknown[0][:60]!r}")


def expect(what: str, value: Any, good: Callable[[Any], bool], expected: str) -> None:
    if not good(value):
        raise ValueError(f"{what}: expected {expected}, found {one_line(repr(value))[:60]}")


def expect_choice(what: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{what} {one_line(repr(value))[:40]}: this vitapack knows {', '.join(known)}"
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
    """Whether it is a number above 0; neither NaN nor infinity is below 1e9."""
    return type(value) in (int, float) and 0 < value <= 1e9
