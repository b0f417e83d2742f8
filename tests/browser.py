"""A headless Chromium for tests of pages, driven over chromedriver's own HTTP (W3C WebDriver)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import httpx
import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the standard gives elements
CONTROL, ESCAPE, ENTER, TAB = "\ue009", "\ue00c", "\ue007", "\ue004"


class Browser:
    """One window. Elements are found by CSS selectors, anew each time: none gets stale."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http, self._path = http, f"/session/{session}"

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def resize(self, width: int, height: int) -> None:
        self._post("/window/rect", width=width, height=height)

    def run(self, script: str, *arguments: object) -> Any:
        """Result of the JavaScript."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def text(self, selector: str) -> str:
        """As a reader sees it; empty where it is hidden."""
        return self._get(f"/element/{self._find(selector)}/text")

    def shown(self, selector: str) -> bool:
        return self._get(f"/element/{self._find(selector)}/displayed")

    def click(self, selector: str) -> None:
        self._post(f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Replaces what is there; special keys work too."""
        element = self._find(selector)
        self._post(f"/element/{element}/clear")
        self._post(f"/element/{element}/value", text=text)

    def press(self, selector: str, keys: str) -> None:
        self._post(f"/element/{self._find(selector)}/value", text=keys)

    def focused(self) -> str:
        """The id of the element that has the keyboard."""
        return self.run("return document.activeElement.id")

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, (
                f"not within {timeout} s: {what}\n{self.text('body')}"
            )
            time.sleep(0.05)

    def wait_text(self, selector: str, part: str) -> None:
        self.wait(lambda: part in self.text(selector), f"{part!r} in {selector}")

    def _find(self, selector: str) -> str:
        return self._post("/element", using="css selector", value=selector)[_ELEMENT]

    def _get(self, path: str) -> Any:
        return _value(self._http.get(self._path + path))

    def _post(self, path: str, **body: object) -> Any:
        return _value(self._http.post(self._path + path, json=body))


@contextlib.contextmanager
def chromium(log: Path, *, dark: bool = False) -> Iterator[Browser]:
    """Skips the test where there is no Chromium with its driver."""
    driver = shutil.which("chromedriver")
    binary = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if driver is None or binary is None:
        pytest.skip(
            "needs Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        )
    port = harness.free_port()
    with open(log, "wb") as out:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=out, stderr=subprocess.STDOUT)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        session = None
        try:
            _wait_for_driver(http, process, log)
            session = _new_session(http, binary, dark=dark)
            yield Browser(http, session)
        finally:
            if session is not None:
                http.delete(f"/session/{session}")
            process.terminate()
            process.wait(10)


def _wait_for_driver(http: httpx.Client, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if http.get("/status").json()["value"]["ready"]:
                return
        time.sleep(0.05)


def _new_session(http: httpx.Client, binary: str, *, dark: bool) -> str:
    options = {
        "binary": binary,
        "args": [
            "--headless=new",
            "--no-sandbox",  # root, as in containers, cannot have it; pages here are our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--window-size=1100,1000",
            *(["--force-dark-mode"] if dark else []),
        ],
    }
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
    answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
    return _value(answer)["sessionId"]


def _value(answer: httpx.Response) -> Any:
    value = answer.json()["value"]
    assert answer.status_code == 200, value
    return value
