"""docs/cli.md, from the parsers: `sps2 docs > docs/cli.md`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from sps2_mega.cli.flags import described, fields_of
from sps2_mega.cli.generate import generate_parser
from sps2_mega.cli.main import COMMANDS
from sps2_mega.cli.serve import serve_parser
from sps2_mega.config import EngineConfig

_IN_ORDER = (
    'python -c \'import json,sys; a={str(r.get("custom_id",r.get("id"))):r for r in '
    "map(json.loads,open(sys.argv[2]))}; "
    '[print(json.dumps(a[str(q.get("custom_id",q.get("id",i)))])) '
    "for i,q in enumerate(map(json.loads,open(sys.argv[1])),1)]' in.jsonl out.jsonl"
)


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 docs") -> int:
    """Print docs/cli.md."""
    argparse.ArgumentParser(prog=prog, description="Print docs/cli.md.").parse_args(argv)
    print(markdown(), end="")
    return 0


def markdown() -> str:
    """Text of docs/cli.md."""
    lines = ["# Command line", "", "Made by `sps2 docs > docs/cli.md`; do not edit.", ""]
    lines += ["| command | |", "|---|---|"]
    lines += [f"| `sps2 {name}` | {text} |" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        "Each lists its flags with `--help`; those of `generate` and `serve` are below. These two",
        "start their ranks themselves on this machine. Under `torchrun` or `deepspeed`, where each",
        "process is one rank, `launch/generate.py` and `launch/serve.py` take the same flags.",
        "",
        "## Generate",
        "",
        "Exit codes: 0 all lines were answered, 1 some lines failed, 2 it could not run.",
        "",
        "Answers are written as they finish. Ids restore the order of the input:",
        "",
        "```",
        _IN_ORDER,
        "```",
    ]
    lines += flag_tables(generate_parser())
    lines += [
        "",
        "## Serve",
        "",
        "`sps2 serve` takes the engine flags above and these; `docs/serving.md` explains them.",
        "Exit codes: 0 stopped in good order, 2 could not start, anything else: a rank failed or",
        "was told to end at once.",
    ]
    lines += flag_tables(serve_parser(), only="server")
    lines += [
        "",
        "## Fields without a flag",
        "",
        "Set with `--override`, as `--override csa.halo=256 --override csa.tail=256`.",
        "",
        "| field | meaning |",
        "|---|---|",
        *unflagged_fields(),
    ]
    return "\n".join(lines) + "\n"


def unflagged_fields() -> Iterator[str]:
    """Table rows of the fields that only --override sets."""
    from sps2_mega.serving.http.settings import ServerConfig

    for config, where in ((EngineConfig, ""), (ServerConfig, " (server)")):
        for spec in fields_of(config):
            if spec.flag is None:
                value = spec.metavar.replace("|", "\\|")
                default = " (default: false)" if spec.kind is bool else ""
                yield f"| `{spec.path}={value}` | {_cell(described(spec))}{default}{where} |"


def flag_tables(parser: argparse.ArgumentParser, *, only: str | None = None) -> list[str]:
    """Markdown tables of a parser's flags, one per group: all groups, or the `only` one."""
    lines: list[str] = []
    for group in parser._action_groups:
        if only is not None and group.title != only:
            continue
        rows = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        rows = [action for action in rows if not isinstance(action, argparse._HelpAction)]
        if rows:
            lines += [
                "",
                f"### {(group.title or '').capitalize()}",
                "",
                "| flag | meaning |",
                "|---|---|",
            ]
            lines += [f"| {_usage(action)} | {_cell(action.help)} |" for action in rows]
    return lines


def _usage(action: argparse.Action) -> str:
    value = action.metavar if action.nargs != 0 else ""
    if action.choices:
        value = ",".join(map(str, action.choices))
    first, *others = action.option_strings
    more = f" (also {', '.join(f'`{other}`' for other in others)})" if others else ""
    return f"`{first}{f' {value}' if value else ''}`{more}"


def _cell(text: str | None) -> str:
    return (text or "").replace("%%", "%").replace("|", "\\|")
