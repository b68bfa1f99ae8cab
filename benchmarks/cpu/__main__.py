"""`python -m benchmarks.cpu`: see run.py."""

import sys

from benchmarks.cpu.run import main

if __name__ == "__main__":
    sys.exit(main())
