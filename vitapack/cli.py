"""The command line: `vitapack COMMAND --help` shows an example of each command.

Builds one parser from the modules of `vitapack.commands` and turns errors into exit codes: a user's
mistake prints one line and exits with 2, an interruption exits with 130. Every long command can be
started again.
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
    """An argparse parser whose errors are one line."""

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
    """Runs one command. Exit codes: 0 done, 2 user's mistake, 130 interrupted."""
    try:
        options = build_parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        sys.exit(_print_error(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(
            _print_error(
                "interrupted; no incomplete file has its final name; run it again (analyze and "
                "generate with --resume) to continue",
                130,
            )
        )
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            file = f" ({error.filename})" if error.filename else ""
            sys.exit(_print_error(f"{error.strerror}{file}", 2))
        raise


def _print_error(line: str, code: int) -> int:
    print(f"vitapack: {' '.join(line.split())}", file=sys.stderr)
    return code
