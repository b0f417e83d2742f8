"""The page at `/` without a browser: served, self-contained, with sound scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest
from fake_engine import FakeEngine
from fake_server import FACTS, MODEL, FakeServer, served_model, serving

from sps2_mega.engine.stats import KVUse
from sps2_mega.metrics import TokenWaits
from sps2_mega.serving.http.page_routes import PAGE_PATHS
from sps2_mega.serving.http.recent_waits import WINDOW_S, RecentWaits

VOID = {"meta", "link", "input", "br"}


@pytest.fixture(scope="module")
def server(tokenizer):
    with serving(FakeEngine(tokenizer)) as running:
        yield running


class Page(HTMLParser):
    """Ids, labels and references of a page; fails on tags closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.inputs: set[str] = set()
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert "style" not in given and not any(name.startswith("on") for name in given), tag
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.references += [given[name] for name in ("src", "href") if given.get(name)]
        if tag == "label" and given.get("for"):
            self.labelled.add(given["for"])
        if tag in ("input", "textarea"):
            if "label" in self._open:
                self.labelled.add(given.get("id", ""))
            self.inputs.add(given.get("id", ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_is_sound_and_asks_only_this_server(server: FakeServer) -> None:
    answer = server.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert page.inputs <= page.labelled, "an input without a label"
    assert not [ref for ref in page.references if "//" in ref]
    for reference in page.references:
        if not reference.startswith("data:"):
            assert server.get(f"/{reference}").status_code == 200, reference


def test_scripts_name_elements_that_exist_and_paths_that_are_served(server: FakeServer) -> None:
    page = Page(server.get("/").text)
    script = server.get("/page.js").text
    named = set(re.findall(r'(?:\$|show|showError)\("([a-z-]+)"', script))
    assert named and named <= set(page.ids)
    stream = server.get("/event_stream.js").text
    fetched = set(re.findall(r'"(v1/[a-z/]+)"', stream)) | set(
        re.findall(r'fetch\("(\w+)"', script)
    )
    assert fetched == {"status", "v1/completions", "v1/chat/completions"}
    paths = server.get("/openapi.json").json()["paths"]
    assert {f"/{path}" for path in fetched} <= set(paths)
    for text in (script, stream, server.get("/page.css").text):
        assert "http:" not in text and "https:" not in text and "//cdn" not in text


def test_all_files_of_the_page_are_open_and_its_numbers_are_not(tokenizer) -> None:
    with serving(FakeEngine(tokenizer), api_key="secret") as server:
        assert {server.get(path).status_code for path in PAGE_PATHS} == {200}
        assert server.get("/status").status_code == 401
        opened = server.get("/status", headers={"Authorization": "Bearer secret"})
        assert opened.json()["model"] == MODEL


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the page's script")
def test_the_stream_reader_takes_any_cut_of_any_stream(server: FakeServer, tmp_path) -> None:
    """Cuts at every byte: through characters and line ends, with comments in between."""
    for name in ("page.js", "event_stream.js"):
        (tmp_path / name).write_text(server.get(f"/{name}").text)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    events = ['{"a":"é\\n"}', "two\nlines", "[DONE]"]
    text = (
        f": keep-alive\n\ndata: {events[0]}\r\n\r\n"
        f"data:two\ndata: lines\n\n: x\n\ndata: {events[2]}\n\ndata: cut"
    )
    (tmp_path / "run.js").write_text(
        f"""
        import {{ eventData, errorText }} from "./event_stream.js";
        const bytes = new TextEncoder().encode({json.dumps(text)});
        for (let size = 1; size <= bytes.length; size++) {{
          const cut = [];
          for (let at = 0; at < bytes.length; at += size) cut.push(bytes.subarray(at, at + size));
          const got = [];
          for await (const data of eventData(cut)) got.push(data);
          console.log(JSON.stringify(got));
        }}
        console.log(errorText({{ error: {{ message: "no" }} }}, 503), errorText(null));
        """
    )
    for name in ("page.js", "run.js"):
        subprocess.run(["node", "--check", name], cwd=tmp_path, check=True, timeout=30)
    ran = subprocess.run(
        ["node", "run.js"], cwd=tmp_path, check=True, timeout=30, capture_output=True, text=True
    )
    *lines, errors = ran.stdout.splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {tuple(events)}
    assert errors == "503: no the server's answer is not readable"


def test_status_in_every_state(tokenizer) -> None:
    engine = FakeEngine(tokenizer, max_model_len=100_000, step_s=0.01)
    with serving(engine, ready=False) as server:
        server.http.call_soon(
            server.async_engine.loading, "reading the weights of fake: 40 % of 1.00 GB"
        )
        status = _status(server, lambda s: s["stage"] is not None)
        assert (status["state"], status["layout"], status["kv_cache"]) == ("loading", None, None)
        assert status["latency"]["ttft"] == {"count": 0, "p50_s": None, "p99_s": None}

        server.http.call_soon(server.async_engine.ready, served_model(engine))
        status = _status(server, lambda s: s["state"] == "ready")
        assert status["stage"] is None
        [cache] = status["kv_cache"]["sides"]
        assert cache == {"name": "all", "blocks_per_rank": 10, "used_per_rank": [0, 0, 0]}
        assert [rank["free"] for rank in status["layout"]["memory"]] == [
            rank.free for rank in FACTS.memory
        ]

        with server.client().completions.create(
            model=MODEL, prompt="abc", max_tokens=50_000, stream=True
        ) as stream:
            for _ in zip(range(3), stream, strict=False):
                continue
            status = _status(server, lambda s: s["latency"]["tbt"]["count"] >= 2)
            assert (status["open_requests"], status["load"]["running"]) == (1, 1)
            assert status["kv_cache"]["sides"][0]["used_per_rank"] == [0, 5, 10]
            [row] = status["requests"]
            assert (row["prompt_tokens"], row["num_samples"], row["stream"]) == (4, 1, True)
            assert row["output_tokens"] >= 3 and 0 < row["age_s"] < 30
            assert status["latency"]["ttft"]["count"] == 1
            assert 0.009 < status["latency"]["tbt"]["p50_s"] < 5
        _status(server, lambda s: s["open_requests"] == 0 and s["requests"] == [])

        server.async_engine.fail_soon("rank 1 died")
        status = _status(server, lambda s: s["state"] == "failed")
        assert status["reason"] == "rank 1 died"


def test_both_pools_of_a_job_in_status_and_metrics(tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    engine.kv_pools = (
        KVUse(pool="prefill", blocks_per_rank=10, used_per_rank=(0, 5)),
        KVUse(pool="decode", blocks_per_rank=4, used_per_rank=(3, 1, 0)),
    )
    with serving(engine) as server:
        server.client().completions.create(model=MODEL, prompt="abc", max_tokens=1)
        status = _status(server, lambda s: len(s["kv_cache"]["sides"]) == 2)
        assert status["kv_cache"]["sides"] == [
            {"name": "prefill", "blocks_per_rank": 10, "used_per_rank": [0, 5]},
            {"name": "decode", "blocks_per_rank": 4, "used_per_rank": [3, 1, 0]},
        ]
        usage = {
            tuple(re.findall(r'side="(\w+)",sp_rank="(\d)"', line)[0]): float(line.split()[-1])
            for line in server.get("/metrics").text.splitlines()
            if line.startswith("sps2:kv_cache_rank_usage_perc{")
        }
        assert usage == {
            ("prefill", "0"): 0.0,
            ("prefill", "1"): 0.5,
            ("decode", "0"): 0.75,
            ("decode", "1"): 0.25,
            ("decode", "2"): 0.0,
        }


def _status(server: FakeServer, condition) -> dict:
    deadline = time.monotonic() + 10
    while not condition(status := server.get("/status").json()):
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    return status


def test_recent_waits_slide() -> None:
    now = [0.0]
    waits = RecentWaits(clock=lambda: now[0])
    assert [h.count for h in waits.histograms()] == [0, 0]
    for second in range(200):
        now[0] = float(second)
        waits.add(TokenWaits(ttfts_s=(1.0,), gaps_s=(0.1, 0.3)))
        waits.add(TokenWaits())
    ttft, tbt = waits.histograms()
    assert WINDOW_S <= ttft.count <= WINDOW_S + 6 and tbt.count == 2 * ttft.count
    assert tbt.percentile(50) == pytest.approx(0.1, rel=0.02)
    assert tbt.percentile(99) == pytest.approx(0.3, rel=0.02)
    now[0] += WINDOW_S + 10
    assert [h.count for h in waits.histograms()] == [0, 0]
