"""Answers a file of requests, on every rank: under deepspeed, torchrun or plain python."""

import sys

from sps2_mega.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
