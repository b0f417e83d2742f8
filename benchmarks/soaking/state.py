"""State required of a server after a soak: nothing in use, nothing waiting, stable memory."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

TOLERANCE = 0.05
_SETTLE_S = 20.0  # for clients that left last
_EMPTY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass(slots=True)
class MemoryCurve:
    """Resident bytes of the server by number of ended requests."""

    samples: list[tuple[int, int]] = field(default_factory=list)

    def add(self, done: int, resident: int) -> None:
        self.samples.append((done, resident))

    def spread(self, total: int) -> tuple[float, float]:
        """Deviation of the second half below and above its median, as shares of it.

        (0, 0) without samples.
        """
        second = [resident for done, resident in self.samples if 2 * done >= total]
        if not second:
            return 0.0, 0.0
        middle = statistics.median(second)
        return min(second) / middle - 1, max(second) / middle - 1

    def outline(self, points: int = 20) -> dict[int, int]:
        """Evenly spaced samples in MiB, for people."""
        step = max(1, len(self.samples) // points)
        return {done: round(resident / 2**20) for done, resident in self.samples[::step]}

    def faults(self, total: int) -> Iterator[str]:
        below, above = self.spread(total)
        if max(-below, above) > TOLERANCE:
            yield (
                f"resident memory went from {100 * below:+.1f} to {100 * above:+.1f} % around "
                "its median "
                f"in the second half; {100 * TOLERANCE:g} % are allowed"
            )


def state_faults(url: str) -> Iterator[str]:
    """Resources still in use after a grace period for clients that left last.

    `url` is without /v1.
    """
    deadline = time.monotonic() + _SETTLE_S
    while any((values := metrics(url, _EMPTY)).values()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for name, value in values.items():
        if value != 0:
            yield f"{name} is {value} at the end and not 0"
    ready = httpx.get(f"{url}/ready", trust_env=False)
    if ready.status_code != 200 or ready.json()["open_requests"] != 0:
        yield f"/ready says {ready.status_code}: {ready.text[:200]}"


def metrics(url: str, names: tuple[str, ...]) -> dict[str, float]:
    """Values of metrics, summed over labels.

    Raises:
        KeyError: one is not there: nothing was checked then.
    """
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    values: dict[str, float] = {}
    for name, value in re.findall(r"^sps2:(\w+)\{[^}]*\} (\S+)$", text, re.M):
        values[name] = values.get(name, 0.0) + float(value)
    return {name: values[name] for name in names}
