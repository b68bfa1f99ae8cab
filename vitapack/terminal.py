"""What all commands share: options of checked types, progress bars, results on stdout.

Progress is written to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vitapack.runtime import choices
from vitapack.runtime.errors import UserError
from vitapack.runtime.files import atomic_path

Report = Callable[[int, int, str], None]  # done, total, phase
T = TypeVar("T")


def checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """A check of `choices` as the `type` of an argparse option."""

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


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """A bar with ETA on stderr; each new phase starts its own bar."""
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

        def report(done: int, total: int, phase: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


def say(options: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    """Prints the result: with --json the data, else the text."""
    print(json.dumps(data, indent=1) if options.json else text)


def write_json(path: Path, data: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")
