"""Facts about processes of this node, from /proc: parent, start time, command line.

Functions return None if there is no such process (or no /proc); they decide nothing.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from sps2_mega.comm.root_cause import Member
from sps2_mega.parallel.launcher import LaunchInfo


def own_member(info: LaunchInfo) -> Member:
    """Identity of this process, as sent to the other ranks."""
    host, pid = socket.gethostname(), os.getpid()
    several_nodes = info.local_world_size < info.world_size
    return Member(
        rank=info.rank,
        node=(host, info.node_rank),
        node_label=f"{host} [{info.node_rank}]" if several_nodes else host,
        pid=pid,
        start_ticks=start_ticks(pid) or 0,
    )


def parent_of(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[1]) if fields else None


def start_ticks(pid: int) -> int | None:
    """Clock ticks between boot and the start of the process: with the pid, its identity."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def command_line(pid: int) -> list[str] | None:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    return [part.decode(errors="replace") for part in raw.split(b"\0") if part]


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on.

    The second, the name, may contain anything.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields
