"""`sps2 simulate` from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sps2_mega.cli.simulate import main

if __name__ == "__main__":
    sys.exit(main(prog="simulate.py"))
