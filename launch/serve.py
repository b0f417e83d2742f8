"""`sps2 serve` as a script for launchers: one process is one rank."""

import sys

from sps2_mega.cli.serve import main

if __name__ == "__main__":
    sys.exit(main(prog="serve.py"))
