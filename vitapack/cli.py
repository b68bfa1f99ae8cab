"""The command line: `vitapack COMMAND --help` has an example of each.

The commands are in `vitapack.commands`; here they become one parser, and their errors exit codes.
A user's mistake is one plain line and exit code 2, an interruption exit code 130; every long
command can be started again.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

import vitapack
from vitapack.commands import (
    analyze,
    bench,
    compress,
    demo,
    doctor,
    evaluate,
    finetune,
    generate,
    inspect,
    plan,
    random_checkpoint,
    tune,
)
from vitapack.runtime.errors import UserError

COMMANDS = (
    demo, analyze, plan, compress, finetune, generate, evaluate, inspect, bench, random_checkpoint,
    tune, doctor,
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def build_parser() -> Parser:
    parser = Parser(prog="vitapack", description=vitapack.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=vitapack.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.__name__.rpartition(".")[2].replace("_", "-"),
            help=command.HELP,
            description=command.HELP,
            epilog=f"example: vitapack {command.EXAMPLE}",
        )
        command.add_options(sub)
        sub.add_argument("--json", action="store_true", help="the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress")
        sub.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 2 the user's mistake, 130 interrupted."""
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        sys.exit(_complain(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(
            _complain(
                "interrupted; nothing half-written has a final name; run it again (analyze and "
                "generate with --resume) to go on",
                130,
            )
        )
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            where = f" ({error.filename})" if error.filename else ""
            sys.exit(_complain(f"{error.strerror}{where}", 2))
        raise


def _complain(line: str, code: int) -> int:
    print(f"vitapack: {' '.join(line.split())}", file=sys.stderr)
    return code
