"""The options of opening a model, of a generation and of `bench`, checked when they are made.

    pipeline.generate(image, GenerateOptions(seed=1, steps=20))
    pipeline.generate(image, seed=1, steps=20)    # the same

The command line, Python, a server and a node all fill these. A value that cannot work raises a
UserError of one line. Light: the command line takes its defaults from here before anything else is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

Options = TypeVar("Options")


def merged(kind: type[Options], options: Options | None, changes: Mapping[str, Any]) -> Options:
    """`options`, by default those of `kind`, with other values of some fields. UserError."""
    return kind(**changes) if options is None else replace(options, **changes)  # type: ignore
