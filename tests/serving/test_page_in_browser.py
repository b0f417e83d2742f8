"""The page at `/` for a reader in headless Chromium, over an engine without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import CONTROL, ENTER, ESCAPE, TAB, Browser, chromium
from fake_engine import FakeEngine
from fake_server import MODEL, FakeServer, serving

from sps2_mega.engine.stats import KVUse


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "chromedriver.log") as running:
        yield running


@pytest.fixture
def server(browser, tokenizer) -> Iterator[FakeServer]:
    with serving(FakeEngine(tokenizer, max_model_len=5000, step_s=0.02)) as running:
        yield running
        browser.open("about:blank")  # a page that still asks would keep the server from ending


def opened(browser: Browser, server: FakeServer) -> None:
    browser.console()
    browser.open(server.url)
    browser.wait_text("#state", "ready")


def ask(browser: Browser, prompt: str, *, max_tokens: int) -> None:
    browser.type("#max-tokens", str(max_tokens))
    browser.type("#prompt", prompt)
    browser.click("#send")


def test_numbers_of_the_server(browser, server) -> None:
    opened(browser, server)
    assert browser.text("h1") == MODEL
    assert browser.run("return document.title").startswith(MODEL)
    assert "6 ranks: TP 2, SP 3, cpu, float32, transport ring" in browser.text("#layout")
    ask(browser, "abz", max_tokens=400)
    browser.wait_text("#running", "1")
    browser.wait_text("#kv li:nth-child(3)", "10 of 10 blocks")
    meters = browser.run(
        "return [...document.querySelectorAll('meter')].map((m) => [m.value, m.max])"
    )
    assert meters == [[0, 10], [5, 10], [10, 10]]
    browser.wait(lambda: float(browser.text("#rate")) > 1, "output tokens per second")
    browser.wait(lambda: browser.text("#tbt").count("ms") == 2, "TBT")
    assert browser.text("#requests tbody td:nth-child(2)") == "4"
    rows = browser.run("return document.querySelectorAll('#memory tbody tr').length")
    assert rows == 6
    browser.click("#stop")
    browser.wait_text("#answer-note", "stopped")
    browser.wait(lambda: not server.engine.has_work(), "the engine has dropped the request")
    browser.wait(lambda: not browser.shown("#requests"), "no open requests")
    assert browser.console() == []


def test_both_pools_of_a_job(browser, server) -> None:
    one_pool = server.engine.kv_pools
    server.engine.kv_pools = (
        KVUse(pool="prefill", blocks_per_rank=10, used_per_rank=(4,)),
        KVUse(pool="decode", blocks_per_rank=7, used_per_rank=(3, 7)),
    )
    try:
        opened(browser, server)
        ask(browser, "abz", max_tokens=2)
        browser.wait_text("#kv li:nth-child(3)", "7 of 7 blocks")
        labels = browser.run(
            "return [...document.querySelectorAll('#kv label')].map((l) => "
            "l.firstChild.textContent)"
        )
        assert labels == ["prefill SP rank 0", "decode SP rank 0", "decode SP rank 1"]
    finally:
        server.engine.kv_pools = one_pool


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_prompt_is_answered_piece_by_piece(browser, server, kind) -> None:
    opened(browser, server)
    browser.click(f"input[value={kind}]")
    ask(browser, "<b>é", max_tokens=60)
    browser.wait(lambda: 0 < len(browser.text("#answer")) < 20, "the first part of the answer")
    browser.wait_text("#answer-note", "60 generated, ended by length, first text after")
    answer = browser.run("return document.querySelector('#answer').textContent")
    assert len(set(answer)) == 1
    assert not browser.shown("#try-error")
    assert browser.console() == []


def test_keys_alone_are_enough(browser, server) -> None:
    opened(browser, server)
    browser.type("#max-tokens", "4000")
    browser.type("#prompt", "a")
    reached = set()
    for _ in range(4):
        browser.press(f"#{browser.focused()}", TAB)
        reached.add(browser.focused())
    assert {"max-tokens", "temperature", "send"} <= reached
    browser.press("#prompt", CONTROL + ENTER)
    browser.wait_text("#answer-note", "generating")
    browser.press("#answer", ESCAPE)
    browser.wait_text("#answer-note", "stopped")


def test_errors_are_shown_as_the_server_says_them(browser, server) -> None:
    opened(browser, server)
    ask(browser, "a" * 5001, max_tokens=1)
    browser.wait_text("#try-error", "413: ")
    assert "at most 5000 fit together" in browser.text("#try-error")
    ask(browser, "a", max_tokens=0)
    assert browser.run("return document.querySelector('#max-tokens').validity.rangeUnderflow")
    ask(browser, "a", max_tokens=4000)
    browser.wait_text("#answer-note", "generating")
    server.async_engine.fail_soon("rank 1 (node a, pid 7) died in step 3 (decode)")
    browser.wait_text("#try-error", "rank 1 (node a, pid 7) died")
    browser.wait_text("#state", "failed")
    assert "rank 1 (node a, pid 7) died" in browser.text("#status-error")


def test_a_server_that_ends_is_told_from_one_that_answers(browser, tokenizer) -> None:
    with serving(FakeEngine(tokenizer), ready=False) as server:
        server.http.call_soon(server.async_engine.loading, "reading the weights of fake")
        browser.open(server.url)
        browser.wait_text("#summary", "reading the weights of fake")
        assert browser.text("#state") == "loading"
    browser.wait_text("#state", "unreachable")


def test_a_key_is_asked_for_and_used(browser, tokenizer) -> None:
    with serving(FakeEngine(tokenizer), api_key="secret") as server:
        browser.open(server.url)
        browser.wait_text("#state", "locked")
        for key, state in (("wrong", "unreachable"), ("secret", "ready")):
            browser.type("#key", key)
            browser.press("#key", ENTER)
            browser.wait_text("#state", state)
        assert not browser.shown("#key-form")
        ask(browser, "ab", max_tokens=3)
        browser.wait_text("#answer", "bbb")


@pytest.mark.parametrize("width", [360, 1400])
def test_no_width_needs_scrolling_sideways(browser, server, width) -> None:
    browser.resize(width, 800)
    opened(browser, server)
    browser.wait_text("#layout", "6 ranks")
    wide = browser.run(
        "document.body.style.width = arguments[0] + 'px'; return document.body.scrollWidth", width
    )
    assert wide <= width
    browser.resize(1100, 1000)


def test_nothing_is_fetched_from_elsewhere(browser, server) -> None:
    opened(browser, server)
    names = browser.run("return performance.getEntriesByType('resource').map((r) => r.name)")
    assert names and all(name.startswith(server.url) for name in names)
