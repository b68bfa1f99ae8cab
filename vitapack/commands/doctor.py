"""`vitapack doctor`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vitapack.terminal import say

HELP = "show what this installation can do and what it lacks"
EXAMPLE = "doctor"


def add_options(parser: ArgumentParser) -> None:
    """It has none of its own."""


def run(options: Namespace) -> None:
    from vitapack.runtime.tools.doctor import examine

    found = examine()
    say(options, found, "\n".join(f"{key:12} {value}" for key, value in found.items()))
