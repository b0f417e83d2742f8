"""Detection of a dead launcher, for launchers that do not arrange it themselves.

    deepspeed (runner) -> deepspeed.launcher.launch -> rank        torchrun (agent) -> rank

The kernel signals a rank whose parent dies. A deepspeed runner that dies orphans `launch`
and with it all ranks, so there the grandparent is watched too. This module only decides
whether the chain is broken; `guard` acts on it.
"""

from __future__ import annotations

import ctypes
import os
import signal

from sps2_mega.comm.process_facts import command_line, parent_of
from sps2_mega.parallel.launcher import LaunchInfo

PR_SET_PDEATHSIG = 1


class LauncherChain:
    """The launcher processes above this rank, as they were when it started.

    Nothing is watched unless a launcher started the rank as its child: a
    background job may outlive its shell.
    """

    def __init__(self, info: LaunchInfo) -> None:
        self._parent: int | None = None
        self._runner: int | None = None
        if info.launcher in ("torchrun", "deepspeed"):
            self._parent = os.getppid()
        if self._parent is not None and info.launcher == "deepspeed":
            grandparent = parent_of(self._parent)
            # `launch` may also have been started by hand or over ssh;
            # its parent then means nothing.
            if grandparent is not None and _is_deepspeed_runner(grandparent):
                self._runner = grandparent

    def ask_for_signal(self) -> None:
        """Make the kernel send this process a SIGTERM as soon as its parent dies."""
        if self._parent is not None:
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    def broken(self) -> str | None:
        """Description of the missing process, or None."""
        if self._parent is None:
            return None
        if os.getppid() != self._parent:
            return f"its launcher (pid {self._parent}) is gone"
        if self._runner is not None and parent_of(self._parent) != self._runner:
            return f"the deepspeed runner (pid {self._runner}) is gone"
        return None


def _is_deepspeed_runner(pid: int) -> bool:
    words = command_line(pid) or []
    names = {os.path.basename(word) for word in words[:3]}  # interpreter, -m, script or module
    return bool(names & {"deepspeed", "ds", "deepspeed.launcher.runner", "runner.py"})
