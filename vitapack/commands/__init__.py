"""One module per command: HELP, EXAMPLE, `add_options(parser)` and `run(options)`.

A module has its command's name. Its top-level imports are light; `run` imports the packages that do
the work, so that `vitapack --help` and `vitapack inspect` need no torch. To add a command, add a
module here and an entry in `vitapack.cli.COMMANDS`.
"""
