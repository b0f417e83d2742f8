"""Defaults and flags of the HTTP server; EngineConfig has the engine's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sps2_mega.config import EngineConfig
from sps2_mega.config_fields import flag, unflagged
from sps2_mega.errors import ConfigError

# Where EngineConfig sets no limit: without one, a server would collect requests whose clients have
# given up.
DEFAULT_MAX_QUEUE = 256
# Offline nobody reads along, so EngineConfig's default never interrupts a prefill.
DEFAULT_TBT_TARGET_MS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP front end; times in seconds.

    `api_key=None` lets everybody in, hence the loopback default of `host`.

    Raises:
        ConfigError: a value is outside its range.
    """

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for all interfaces")
    port: int = flag(8000, "TCP port to listen on; 0 takes a free one")
    api_key: str | None = flag(
        None,
        "what clients must send as bearer token; SPS2_API_KEY does the same, unseen by ps "
        "(default: no key)",
    )
    served_model_name: str | None = flag(
        None, "the model's name for clients (default: the last part of --model)"
    )
    request_timeout: float = unflagged(3600.0, "seconds from a request to the end of its answer")
    max_body_bytes: int = unflagged(32 * 2**20, "largest request body")
    drain_timeout: float = flag(
        25.0, "seconds that running requests get after SIGTERM; launchers kill after 30"
    )
    stream_keep_alive: float = unflagged(
        10.0, "seconds of silence in a stream before a comment keeps proxies from closing it"
    )

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, range_text: str) -> None:
            if not ok:
                raise ConfigError(f"{name} must be {range_text}, got {getattr(self, name)!r}")

        need(0 <= self.port < 2**16, "port", "in [0, 65535]")
        need(self.request_timeout > 0, "request_timeout", "> 0")
        need(self.max_body_bytes >= 1, "max_body_bytes", ">= 1")
        need(self.drain_timeout >= 0, "drain_timeout", ">= 0")
        need(self.stream_keep_alive > 0, "stream_keep_alive", "> 0")
        need(
            self.api_key is None or (self.api_key.isascii() and self.api_key.isprintable()),
            "api_key",
            "printable ASCII",
        )
        need(self.api_key != "", "api_key", "not empty")


def model_name(server: ServerConfig, model: str) -> str:
    """Name of the model for clients."""
    return server.served_model_name or model.rstrip("/").rpartition("/")[2] or model


def for_serving(config: EngineConfig) -> EngineConfig:
    """The engine's configuration in a server.

    Adds the server's target for the time between tokens where none was given and the scheduler
    takes one.
    """
    scheduler = config.scheduler
    if scheduler.policy == "sarathi" or scheduler.tbt_target_ms is not None:
        return config
    return config.replace(
        scheduler=dataclasses.replace(scheduler, tbt_target_ms=DEFAULT_TBT_TARGET_MS)
    )
