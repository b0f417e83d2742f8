"""One part of the measurements in a process of its own, whose cases may fail one by one.

A case that fails (no memory, no kernel for a shape) is recorded with its error and the next one
goes on; one for which no time is left is recorded as skipped. A part's process may be ended at any
time: its file is complete up to the last case. Decides no measurement.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Setting of a part; `deadline` is on time.monotonic(), `file` gets one JSON object a line."""

    name: str
    sizes: Sizes
    device: torch.device
    deadline: float
    file: Path

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.sizes.dtype)
        return dtype

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def case(
        self, what: dict[str, Any], work: Callable[[], dict[str, Any]], *, seconds: float = 0.0
    ) -> dict[str, Any] | None:
        """Record `what` with the result of `work`, which is also returned.

        Where there is none, the reason is recorded and None returned. `seconds` is how long it may
        take on the slowest device worth a wait.
        """
        left = self.deadline - time.monotonic()
        if left < seconds:
            self._record(what | {"skipped": f"{left:.0f} s left, it may take {seconds:.0f}"})
            return None
        try:
            found = work()
        except Exception as error:  # noqa: BLE001  one case must not take the others with it
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            self._record(what | {"error": f"{type(error).__name__}: {lines[0][:300]}"})
            found = None
        else:
            self._record(what | found)
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
        return found

    def _record(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"  {self.name}: {json.dumps(row)[:400]}", flush=True)
