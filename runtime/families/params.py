"""Hyper-parameters from configuration files, each read once and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitapack.runtime.errors import FormatError
from vitapack.runtime.loading.checkpoint_files import first_names


class Params:
    """Hyper-parameters from a config file, taken one by one and checked."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        if not isinstance(values, Mapping):
            raise FormatError(f"{where}: a {type(values).__name__}; expected settings by name")
        self.values, self.where, self.taken = values, where, set[str]()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The value as `kind` (int, float, bool, str); FormatError where missing or of another."""
        self.taken.add(name)
        value = self.values.get(name, default)
        if value is None:
            raise FormatError(f"{self.where}: {name} is missing")
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise FormatError(f"{self.where}: {name} is {value!r}; expected a {kind.__name__}")
        if kind is float and not 0 <= abs(value) <= 1e9:
            raise FormatError(f"{self.where}: {name} is {value!r}; expected at most 1e9")
        return kind(value)

    def size(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to a million."""
        value = self.take(name, int, default)
        if not least <= value <= 1_000_000:
            raise FormatError(f"{self.where}: {name} is {value}; expected {least} to 1000000")
        return value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """Of layers, from `least` to a thousand: each is a module, and takes 1 ms to make."""
        value = self.size(name, default, least)
        if value > 1000:
            raise FormatError(f"{self.where}: {name} is {value}; expected at most 1000")
        return value

    def drop(self, *names: str) -> None:
        """Known, and without any effect on the network."""
        self.taken.update(names)

    def done(self) -> None:
        """FormatError for values that nobody took: they might change the network.

        One that is switched off (null, false, 0, "", empty) cannot, whatever it is.
        """
        unknown = sorted(str(key) for key in self._left() if self.values[key])
        if unknown:
            known = ", ".join(sorted(self.taken))
            raise FormatError(f"{self.where}: unknown {first_names(unknown)}; known are {known}")

    def left(self) -> tuple[str, ...]:
        """Values that nobody took, in words, where the tensors tell enough: for parts whose
        released configurations carry settings of training and export. Not _class_name and the
        like, which diffusers writes for itself."""
        left = {str(key): key for key in self._left() if not str(key).startswith("_")}
        short = {name: repr(self.values[key])[:40] for name, key in left.items()}
        return tuple(f"{self.where}: {key} = {value}" for key, value in sorted(short.items()))

    def _left(self) -> set[Any]:
        return set(self.values) - self.taken
