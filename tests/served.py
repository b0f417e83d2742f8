"""Command lines of launch/serve.py, the bundled model on two ranks; the server's address."""

from __future__ import annotations

import re

from launched import ROOT, LaunchedJob


def serve_command(*extra: str, num_blocks: int = 2048) -> list[str]:
    """The program's part of a command line; the port is the system's choice."""
    layout = ["--sp", "2", "--dtype", "float32", "--device", "cpu"]
    cache = ["--num-gpu-blocks-override", str(num_blocks)]
    return [str(ROOT / "launch" / "serve.py"), "--port", "0", *layout, *cache, *extra]


def url_when_ready(job: LaunchedJob) -> str:
    """http://HOST:PORT, from the line that gives the API's address and the page's."""
    ready = re.compile(
        r"^sps2_mega is ready: sps2-tiny at (http://127\.0\.0\.1:\d+)/v1.* page at \1/", re.M
    )
    job.wait_until(lambda: ready.search(job.output()) is not None, 120)
    return ready.search(job.output())[1]
