"""`python -m sps2_mega.cli`: the `sps2` command where it is not installed."""

import sys

from sps2_mega.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
