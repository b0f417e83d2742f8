"""`sps2 serve` as a script for launchers: one process is one rank."""

import sys

from sps2_mega.cli.serve import main
from sps2_mega.garbage_collection import postpone

if __name__ == "__main__":
    postpone()
    sys.exit(main(prog="serve.py"))
