"""`vitapack doctor`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vitapack.terminal import say

HELP = "show what this installation can do and what it lacks"
EXAMPLE = "doctor"


def add_options(parser: ArgumentParser) -> None:
    """Adds no options."""


def run(options: Namespace) -> None:
    from vitapack.runtime.tools.doctor import examine

    report = examine()
    say(options, report, "\n".join(f"{key:12} {value}" for key, value in report.items()))
