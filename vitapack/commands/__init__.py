"""One module per command: HELP, EXAMPLE, `add_options(parser)` and `run(options)`.

A module's name is the command's. Its imports at the top are light, `run` imports the packages that
do the work, so that `vitapack --help` and `vitapack inspect` need no torch. A new command is one
more file here and one more entry in `vitapack.cli.COMMANDS`.
"""
