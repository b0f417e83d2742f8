"""Edge of a rank: an exception on one rank ends the job on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sps2_mega.comm.watchdog import Watchdog


@contextmanager
def failing(watchdog: Watchdog) -> Iterator[None]:
    """End the whole job, not only this rank, when the body raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  a rank's edge: told to all ranks
        watchdog.fail(error)
