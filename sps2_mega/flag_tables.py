"""The flags of a command as Markdown tables, one per group; what stands around them is `cli`'s."""

from __future__ import annotations

import argparse


def flag_tables(parser: argparse.ArgumentParser, *, only: str | None = None) -> list[str]:
    """Lines of Markdown: all groups that have flags, or the `only` one."""
    lines: list[str] = []
    for group in parser._action_groups:
        if only is not None and group.title != only:
            continue
        rows = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        rows = [action for action in rows if not isinstance(action, argparse._HelpAction)]
        if rows:
            lines += [
                "",
                f"## {(group.title or '').capitalize()}",
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
    return f"`{action.option_strings[0]}{f' {value}' if value else ''}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("%%", "%").replace("|", "\\|")
