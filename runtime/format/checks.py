"""Checks of untrusted JSON fields: each raises ValueError naming the field, found and expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitapack.runtime.format.architecture import BLOCK_KINDS, FLOW
from vitapack.runtime.format.container import (
    one_line,
)
from vitapack.runtime.format.layermap import BLOCK_FIELDS


def checked_network(data: Any) -> dict[str, Any]:
    """The architecture as a packed file and a vitality table state it; ValueError naming the field
    that is wrong."""
    _object("network", data)
    _choice("network kind", data.get("kind"), tuple(BLOCK_KINDS))
    count: Callable[[Any], bool] = lambda v: type(v) is int and 1 <= v <= 1 << 20  # noqa: E731
    flag: Callable[[Any], bool] = lambda v: type(v) is bool  # noqa: E731
    number: Callable[[Any], bool] = lambda v: type(v) in (int, float) and 0 < v <= 1e9  # noqa: E731
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "kind": (_text, "a kind of network"),
        "in_channels": (count, "a size"),
        "cond_channels": (count, "a size"),
        "hidden": (count, "a size"),
        "heads": (count, "a count"),
        "mlp_ratio": (lambda v: number(v) and v <= 64, "a number in 0..64"),
        "time": (lambda v: isinstance(v, dict), "an object"),
    }
    for kind in BLOCK_KINDS[data["kind"]]:
        checks[BLOCK_FIELDS[kind]] = (_indices, "ascending original indices")
    if data["kind"] == FLOW:
        few: Callable[[Any], bool] = lambda v: type(v) is int and 0 <= v <= 1024  # noqa: E731
        checks |= {"resolution": (few, "0..1024"), "in_channels": (few, "0..1024")}
        checks["patch"] = (lambda v: few(v) and 1 <= v <= 16, "1..16")
    else:
        checks |= {name: (flag, "true or false") for name in ("qkv_bias", "guidance_embed")}
    time_checks = {
        "channels": (count, "a size"),
        "hidden": (count, "a size"),
        "scale": (number, "a number > 0"),
        "max_period": (number, "a number > 0"),
        "cos_first": (flag, "true or false"),
        "activation": (lambda v: v in ("silu", "gelu"), "'silu' or 'gelu'"),
    }
    _keys("network", data, tuple(checks))
    for name, (check, expected) in checks.items():
        _check(f"network {name}", data[name], check, expected)
    _keys("network time", data["time"], tuple(time_checks))
    for name, (check, expected) in time_checks.items():
        _check(f"network time {name}", data["time"][name], check, expected)
    if data["hidden"] % data["heads"] or data["time"]["channels"] % 2:
        raise ValueError(
            f"network: hidden {data['hidden']} must be a multiple of heads {data['heads']}, "
            f"and time channels {data['time']['channels']} even"
        )
    return data


def _object(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, found {type(value).__name__}")
    return value


def _keys(what: str, data: dict[str, Any], known: tuple[str, ...]) -> None:
    if missing := sorted(set(known) - set(data)):
        raise ValueError(f"{what}: missing {', '.join(missing)}")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"{what}: unknown field {unknown[0][:60]!r}")


def _check(what: str, value: Any, good: Callable[[Any], bool], expected: str) -> None:
    if not good(value):
        raise ValueError(f"{what}: expected {expected}, found {one_line(repr(value))[:60]}")


def _choice(what: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{what} {one_line(repr(value))[:40]}: this vitapack knows {', '.join(known)}"
        )


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and (value.isprintable() or not value)


def _indices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(type(v) is int and 0 <= v < 10_000 for v in value)
        and value == sorted(set(value))
    )
