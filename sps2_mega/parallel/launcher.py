"""Launch environment and session settings; the only reader of environment variables.

    launcher    node size         node rank    recognised by
    torchrun    LOCAL_WORLD_SIZE  GROUP_RANK   TORCHELASTIC_RUN_ID or GROUP_RANK
    deepspeed   LOCAL_SIZE        CROSS_RANK   CROSS_RANK
    env         LOCAL_WORLD_SIZE  NODE_RANK    RANK or WORLD_SIZE alone
    none        1                 0            none of the above: one rank

This module decides nothing about groups or devices and opens no connection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sps2_mega.errors import ConfigError

Launcher = Literal["torchrun", "deepspeed", "env", "none"]

_NODE_VARIABLES: dict[Launcher, tuple[str, str]] = {
    "torchrun": ("LOCAL_WORLD_SIZE", "GROUP_RANK"),
    "deepspeed": ("LOCAL_SIZE", "CROSS_RANK"),
    "env": ("LOCAL_WORLD_SIZE", "NODE_RANK"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInfo:
    """Place of this process in the job.

    `master_port` is 0 (any free port) only without a launcher.

    Raises:
        ConfigError: the numbers contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    master_addr: str
    master_port: int
    launcher: Launcher

    def __post_init__(self) -> None:
        def need(ok: bool, problem: str) -> None:
            if not ok:
                raise ConfigError(f"contradictory launch environment: {problem} ({self})")

        need(self.world_size >= 1, "the world size must be >= 1")
        need(0 <= self.rank < self.world_size, "the rank must be in [0, world size)")
        need(
            1 <= self.local_world_size <= self.world_size,
            "the ranks of a node must be in [1, world size]",
        )
        need(
            0 <= self.local_rank < self.local_world_size,
            "the local rank must be in [0, ranks of the node)",
        )
        need(self.local_rank <= self.rank, "the local rank exceeds the rank")
        need(0 <= self.node_rank <= self.rank, "the node rank must be in [0, rank]")
        if self.local_world_size == self.world_size:
            need(
                self.local_rank == self.rank and self.node_rank == 0,
                "on a single node the local rank is the rank and the node rank is 0",
            )


def from_environment(environ: Mapping[str, str] | None = None) -> LaunchInfo:
    """Read the place in the job from `environ` (default: this process's environment).

    Raises:
        ConfigError: variables are missing, not numbers, or contradict each other; all are named.
    """
    environ = os.environ if environ is None else environ
    launcher = _recognise(environ)
    if launcher == "none":
        return LaunchInfo(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            node_rank=0,
            master_addr="127.0.0.1",
            master_port=0,
            launcher=launcher,
        )
    node_size_name, node_rank_name = _NODE_VARIABLES[launcher]
    needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    one_node = launcher == "env" and "LOCAL_RANK" not in environ and node_size_name not in environ
    if not one_node:
        needed += ["LOCAL_RANK", node_size_name]
    if launcher != "env":
        needed.append(node_rank_name)
    missing = [name for name in needed if not environ.get(name, "").strip()]
    if missing:
        raise ConfigError(_missing_text(launcher, missing, needed, environ))

    rank = _integer(environ, "RANK")
    world_size = _integer(environ, "WORLD_SIZE")
    local_world_size = world_size if one_node else _integer(environ, node_size_name)
    if node_rank_name in environ:
        node_rank = _integer(environ, node_rank_name)
    else:
        node_rank = rank // max(local_world_size, 1)
    return LaunchInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank if one_node else _integer(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        node_rank=node_rank,
        master_addr=environ["MASTER_ADDR"].strip(),
        master_port=_integer(environ, "MASTER_PORT"),
        launcher=launcher,
    )


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Folder of this user's caches of the project: below XDG_CACHE_HOME, default ~/.cache."""
    environ = os.environ if environ is None else environ
    home = environ.get("XDG_CACHE_HOME", "").strip()
    return Path(home or Path.home() / ".cache") / "sps2_mega"


def server_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """API key that clients of this user's server must send: SPS2_API_KEY, or None if unset."""
    environ = os.environ if environ is None else environ
    return environ.get("SPS2_API_KEY", "").strip() or None


def _recognise(environ: Mapping[str, str]) -> Launcher:
    if "TORCHELASTIC_RUN_ID" in environ or "GROUP_RANK" in environ:
        return "torchrun"
    if "CROSS_RANK" in environ:
        return "deepspeed"
    # MASTER_* alone say nothing: they are often set for a whole cluster or session.
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return "env"
    return "none"


def _missing_text(
    launcher: Launcher, missing: list[str], needed: list[str], environ: Mapping[str, str]
) -> str:
    found = ", ".join(f"{name}={environ[name]}" for name in needed if name not in missing)
    how = {
        "torchrun": "the environment looks like torchrun's",
        "deepspeed": "the environment looks like the deepspeed launcher's",
    }.get(launcher, "the environment looks like that of a rank without a known launcher")
    return (
        f"{how}, but {', '.join(missing)} not set (found: {found or 'none of the others'}); "
        "start through torchrun or deepspeed, or unset RANK, WORLD_SIZE and LOCAL_RANK for one rank"
    )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {environ[name]!r}") from None
