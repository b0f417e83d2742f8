"""Edge of a rank: an exception on one rank ends the job on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sps2_mega.errors import Refused

if TYPE_CHECKING:
    from sps2_mega.comm.watchdog import Watchdog


@contextmanager
def failing(watchdog: Watchdog) -> Iterator[None]:
    """End the whole job, not only this rank, when the body raises.

    A job of one rank concerns nobody else: the caller gets the exception.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if watchdog.is_alone:
            raise
        watchdog.fail(error)
