"""`python -m vitapack`: the same program as the command `vitapack`."""

from vitapack.cli import main

if __name__ == "__main__":
    main()
