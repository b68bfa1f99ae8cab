"""`python -m benchmarks.gpu`: see run.py."""

import sys

from benchmarks.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
