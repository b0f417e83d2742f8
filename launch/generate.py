"""`sps2 generate` as a script for launchers: one process is one rank."""

import sys

from sps2_mega.cli.generate import main
from sps2_mega.garbage_collection import postpone

if __name__ == "__main__":
    postpone()
    sys.exit(main(prog="generate.py", starts_ranks=False))
