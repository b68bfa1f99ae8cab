"""Helpers shared by all commands: checked option types, progress bars, results.

Progress is written to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from vitapack.runtime import choices, progress
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path

T = TypeVar("T")


def checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """Turns a check of `choices` into the `type` of an argparse option."""

    def convert(text: str) -> T:
        try:
            return check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


COUNT = checked(choices.at_least_one)
COUNTS = checked(choices.counts)
SEED = checked(choices.seed)
SIZE = checked(choices.size_bytes)


def filled(kind: type[T], options: argparse.Namespace) -> T:
    """An option object from the command-line options named like its fields; options that were not
    given keep its defaults. Raises UserError if a value is invalid."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})


@contextmanager
def watched(quiet: bool = False) -> Iterator[progress.Control]:
    """A control that shows progress on stderr: one bar with ETA per phase."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def report(event: progress.Progress) -> None:
            if event.phase not in tasks:
                tasks[event.phase] = bars.add_task(event.phase, total=event.total)
            bars.update(tasks[event.phase], completed=event.done, total=event.total)

        yield progress.Control(report)


def say(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Prints the result: the data with --json, else the text."""
    print(json.dumps(data, indent=1) if options.json else text)


def write_json(path: Path, data: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
