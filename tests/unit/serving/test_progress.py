from __future__ import annotations

import io

from fake_engine import Stats

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.outputs import Completion, RequestOutput, Timings
from sps2_mega.serving import progress
from sps2_mega.serving.drive import failed
from sps2_mega.serving.progress import Progress, RunTotals
from sps2_mega.types import FinishReason


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answer() -> RequestOutput:
    timings = Timings(queue_s=0.1, ttft_s=0.5, per_token_s=0.02, total_s=1, gaps_s=(0.01, 0.03))
    completion = Completion(
        index=0,
        text="x",
        token_ids=[1, 2, 3],
        finish_reason=FinishReason.STOP,
        logprobs=None,
        timings=timings,
    )
    return RequestOutput(request_id="r", prompt_token_ids=[1] * 1200, completions=[completion])


def stats(prompt: int, output: int) -> Stats:
    return Stats(
        num_running=3, num_waiting=4, kv_usage=0.25, prompt_tokens=prompt, output_tokens=output
    )


def test_plain_lines_where_there_is_no_terminal(monkeypatch) -> None:
    stream, totals = io.StringIO(), RunTotals()
    shown = Progress(8, totals, stream=stream)
    shown.step(stats(100, 2), 0.5)
    assert stream.getvalue() == ""  # not before the interval
    monkeypatch.setattr(progress, "_PLAIN_INTERVAL", 0.0)
    shown = Progress(8, totals, stream=stream)
    totals.add(answer())
    shown.step(stats(100, 2), 0.5)
    line = stream.getvalue()
    assert line.startswith("1/8 requests (12 %)") and line.endswith("\n")
    assert "3 running, 4 waiting, KV 25%" in line
    assert "prefill 200 tok/s" in line
    shown.close()


def test_bar_on_a_terminal() -> None:
    stream, totals = Terminal(), RunTotals()
    shown = Progress(2, totals, stream=stream)
    totals.add(answer())
    totals.add(failed("x", "bad"))
    shown.step(stats(10, 1), 0.1)
    shown.close()
    assert "2/2" in stream.getvalue()
    assert "KV 25%" in stream.getvalue()


def test_prefill_and_decode_are_counted_apart() -> None:
    totals = RunTotals()
    shown = Progress(1, totals, stream=io.StringIO())
    shown.step(stats(100, 2), 0.5)
    shown.step(stats(100, 6), 0.1)
    shown.step(stats(100, 10), 0.1)
    assert round(totals.steps.prefill_rate) == 200
    assert round(totals.steps.decode_rate) == 40


def test_closing_table() -> None:
    totals = RunTotals()
    totals.add(answer())
    totals.add(failed("x", "bad"))
    rows = dict(line.split(" | ") for line in totals.table().splitlines() if " | " in line)
    table = {name.strip(): value for name, value in rows.items()}
    assert table["requests ok"] == "1"
    assert table["requests failed"] == "1"
    assert table["prompt tokens"] == "1,200"
    assert table["output tokens"] == "3"
    low, high = (float(part) for part in table["TBT p50 / p99"].removesuffix(" ms").split(" / "))
    assert (abs(low - 10) < 0.2, abs(high - 30) < 0.6) == (True, True)


def test_hidden_communication_is_shown_where_there_is_any(monkeypatch) -> None:
    stream, totals = io.StringIO(), RunTotals()
    monkeypatch.setattr(progress, "_PLAIN_INTERVAL", 0.0)
    shown = Progress(1, totals, stream=stream)
    assert "hidden" not in totals.table()
    counts = stats(100, 2)
    counts.prefill_comm = CommSeconds(exposed_comm_s=0.5, total_comm_s=2.0)
    shown.step(counts, 0.5)
    assert "prefill 200 tok/s (75% of communication hidden)" in stream.getvalue()
    assert "prefill waits for data | 0.50 of 2.00 s (75% hidden)" in totals.table()


def test_table_of_nothing() -> None:
    assert "| -" in RunTotals().table()
