"""Worker processes that end with the one that started them, however that ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

_LOOK_S = 0.5


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Run `jobs` processes; an error or Ctrl-C in the block cancels what has not begun."""
    pool = ProcessPoolExecutor(max_workers=jobs, initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """End this worker when its parent is gone; else it would wait for a task for ever."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)
