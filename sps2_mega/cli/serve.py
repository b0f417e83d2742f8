"""`sps2 serve`: the OpenAI API over one model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from sps2_mega.cli.flags import config_from
from sps2_mega.cli.parser import EXIT_COULD_NOT_RUN, ConfigParser
from sps2_mega.cli.rank_logging import log_to_stderr
from sps2_mega.config import EngineConfig
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.launcher import from_environment, server_api_key


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 serve") -> int:
    """Serve the OpenAI API until told to stop; called on every rank.

    Without a launcher, the other ranks are started on this machine. Exit codes: 0 stopped in good
    order, 2 could not start, others as the job failed.
    """
    try:
        info = from_environment()
    except ConfigError as error:
        print(f"sps2_mega: error: {error}", file=sys.stderr)
        return EXIT_COULD_NOT_RUN
    parser = serve_parser(prog=prog, quiet=info.rank > 0)
    parsed = parser.parse_args(argv)
    from sps2_mega.serving.http.settings import ServerConfig, for_serving

    try:
        config = for_serving(config_from(EngineConfig, parsed))
        server = config_from(ServerConfig, parsed)
        if server.api_key is None:
            server = dataclasses.replace(server, api_key=server_api_key())
    except ConfigError as error:
        parser.error(str(error))
    log_to_stderr(info, parsed.notes)

    from sps2_mega.serving.serve import run_serve

    return run_serve(config, server, info)


def serve_parser(*, prog: str = "sps2 serve", quiet: bool = False) -> ConfigParser:
    """All flags of `serve`; a `quiet` parser leaves mistakes to another rank."""
    from sps2_mega.serving.http.settings import ServerConfig

    parser = ConfigParser(
        prog=prog,
        description="Serve a model on tp * sp ranks through the OpenAI API.",
        quiet=quiet,
    )
    parser.add_configs({"server": ServerConfig, "engine": EngineConfig})
    return parser
