"""Hyper-parameters from configuration files, each read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitapack.runtime.errors import FormatError
from vitapack.runtime.loading.checkpoint_files import first_names


class Params:
    """Settings of one section, taken one by one and checked; `label` starts the messages.

    All methods raise FormatError.
    """

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        if not isinstance(values, Mapping):
            raise FormatError(f"{label}: a {type(values).__name__}; expected settings by name")
        self.values, self.label, self.taken = values, label, set[str]()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value, which must be of `kind` (int, float, bool, str)."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is None:
            raise FormatError(f"{self.label}: {name} is missing")
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise FormatError(f"{self.label}: {name} is {value!r}; expected a {kind.__name__}")
        if kind is float and not 0 <= abs(value) <= 1e9:
            raise FormatError(f"{self.label}: {name} is {value!r}; expected at most 1e9")
        return kind(value)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` to a million."""
        value = self.take(name, int, default)
        if not least <= value <= 1_000_000:
            raise FormatError(f"{self.label}: {name} is {value}; expected {least} to 1000000")
        return value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A number of layers, `least` to a thousand: each is a module and takes 1 ms to make."""
        value = self.size(name, default, least)
        if value > 1000:
            raise FormatError(f"{self.label}: {name} is {value}; expected at most 1000")
        return value

    def drop(self, *names: str) -> None:
        """Marks settings as known and without effect on the network."""
        self.taken.update(names)

    def done(self) -> None:
        """Refuses settings that were not taken, since they might change the network.

        One that is off (null, false, 0, "", empty) cannot.
        """
        unknown = sorted(str(key) for key in self._left() if self.values[key])
        if unknown:
            known = ", ".join(sorted(self.taken))
            raise FormatError(f"{self.label}: unknown {first_names(unknown)}; known are {known}")

    def left(self) -> tuple[str, ...]:
        """Descriptions of settings that were not taken, for components whose released
        configurations carry settings of training and export, and whose tensors determine the
        network. Without _class_name and the like, which diffusers writes for itself."""
        left = {str(key): key for key in self._left() if not str(key).startswith("_")}
        short = {name: repr(self.values[key])[:40] for name, key in left.items()}
        return tuple(f"{self.label}: {key} = {value}" for key, value in sorted(short.items()))

    def _left(self) -> set[Any]:
        return set(self.values) - self.taken
