"""`python -m benchmarks.emd`: see run.py."""

import sys

from benchmarks.emd.run import main

if __name__ == "__main__":
    sys.exit(main())
