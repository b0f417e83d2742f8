"""Parser of `serve` and `generate`: flags of config dataclasses, --override, former spellings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sps2_mega.cli.flags import add_flags, fields_of
from sps2_mega.cli.former_flags import add_former_flags, take_former_flags
from sps2_mega.cli.overrides import values_of
from sps2_mega.errors import ConfigError

EXIT_COULD_NOT_RUN = 2


class ConfigParser(argparse.ArgumentParser):
    """A parser of config dataclasses; the namespace has their fields by dotted path, and `notes`.

    `notes` are log lines about deprecated flags. A `quiet` parser leaves help and mistakes to
    another rank.
    """

    def __init__(self, *, prog: str, description: str, quiet: bool) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.quiet = quiet
        self._fields: dict[str, Any] = {}

    def add_configs(self, groups: dict[str, type]) -> None:
        """Add the flags of config dataclasses under the titles of their groups."""
        for title, config in groups.items():
            group = self.add_argument_group(title)
            add_flags(group, config)
            self._fields |= {spec.path: spec for spec in fields_of(config)}
        group.add_argument(
            "--override",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="set a configuration field that has no flag, as csa.halo=256; can be given "
            "several times",
        )
        add_former_flags(self, self._fields)
        # Launchers add it; the rank is taken from the environment.
        self.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        try:
            for path, value in values_of(parsed.override, self._fields).items():
                if path in vars(parsed):
                    flag = self._fields[path].flag
                    raise ConfigError(f"--override {path} and --{flag} are the same: give one")
                vars(parsed)[path] = value
            parsed.notes = take_former_flags(parsed, self._fields)
        except ConfigError as error:
            self.error(str(error))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        if self.quiet:
            sys.exit(EXIT_COULD_NOT_RUN)
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        if not self.quiet:
            super().print_help(file)
