"""The `sps2` command: dispatch to one module per subcommand, imported only when it is called.

sps2 {serve,generate,convert,inspect,doctor,plan,simulate} ...
sps2 docs > docs/cli.md
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import sps2_mega
from sps2_mega.garbage_collection import postpone

# Command -> its module, and what it does.
COMMANDS = {
    "serve": ("serve", "serve a model through the OpenAI API"),
    "generate": ("generate", "answer a file of requests"),
    "convert": ("convert_checkpoint", "convert a checkpoint between Hugging Face and Megatron"),
    "inspect": ("inspect_checkpoint", "say what a checkpoint folder holds"),
    "doctor": ("doctor", "what this machine has, what will be used, what is missing"),
    "plan": ("plan", "the best layout of a model for a cluster, a trace and limits"),
    "simulate": ("simulate", "replay a request trace on a simulated cluster"),
}
_HIDDEN = {"docs": "documentation"}  # prints docs/cli.md
_STARTING_RANKS = ("serve", "generate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"sps2 {sps2_mega.__version__}")
        return 0
    modules = {command: module for command, (module, _) in COMMANDS.items()} | _HIDDEN
    if name not in modules:
        problem = "a command is needed" if name is None else f"unknown command {name!r}"
        print(f"{usage()}\n\nsps2: error: {problem}", file=sys.stderr)
        return 2
    if argv is None and name in _STARTING_RANKS:
        postpone()
    command = importlib.import_module(f"sps2_mega.cli.{modules[name]}")
    return int(command.main(arguments[1:], prog=f"sps2 {name}"))


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sps2 COMMAND ...",
            "       sps2 COMMAND --help",
            "       sps2 --version",
            "",
            "Sequence-parallel serving of long prompts for Megatron and DeepSpeed models.",
            "",
            *lines,
        ]
    )
