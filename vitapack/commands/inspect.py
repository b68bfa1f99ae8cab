"""`vitapack inspect`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vitapack.terminal import say

HELP = "describe a packed file from its header alone, without torch"
EXAMPLE = "inspect model.safetensors"


def add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("packed", type=Path)


def run(options: Namespace) -> None:
    from vitapack.runtime.format.describe import describe
    from vitapack.runtime.format.header import read_header

    header = read_header(options.packed)
    say(options, header.to_json(), describe(header))
