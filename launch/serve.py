"""Serves a model through the OpenAI API, on every rank: under deepspeed, torchrun or plain
python."""

import sys

from sps2_mega.cli import serve

if __name__ == "__main__":
    sys.exit(serve())
