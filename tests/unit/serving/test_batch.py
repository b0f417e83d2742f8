"""A batch from file to file with an engine without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from sps2_mega.config import EngineConfig, SchedulerConfig
from sps2_mega.errors import ConfigError
from sps2_mega.serving.batch import BatchJob, BatchOptions
from sps2_mega.serving.batch_output import BatchOutput, OutputMode, state_path
from sps2_mega.worker.sampling.seeds import derive_seed_from_text

CONFIG = EngineConfig(scheduler=SchedulerConfig(max_running=2))


class Files:
    """An input and an output in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def write(self, *lines: object) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.input.write_text("".join(text + "\n" for text in texts))

    def run(self, engine: FakeEngine, *, config: EngineConfig = CONFIG, **options: object) -> int:
        job = BatchJob.prepare(
            BatchOptions(input=self.input, output=self.output, **options), config
        )
        try:
            return job.run(engine)
        finally:
            job.close()

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


def chat_line(custom_id: str, **body: object) -> dict:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "hé"}], "max_tokens": 2, **body},
    }


def test_simple_lines(files, tokenizer) -> None:
    files.write(
        {"id": "a", "prompt": "xy", "max_tokens": 3, "logprobs": 0}, {"prompt": [65, 66, 67]}
    )
    assert files.run(FakeEngine(tokenizer)) == 0
    by_id = {record["id"]: record for record in files.records()}
    assert by_id.keys() == {"a", 2}
    record = by_id["a"]
    assert list(record) == [
        "id", "text", "token_ids", "finish_reason", "usage", "timings", "logprobs",
    ]  # fmt: skip
    assert record["text"] == "yyy"
    assert record["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert record["timings"].keys() == {"queue_s", "ttft_s", "per_token_s", "total_s"}
    assert record["logprobs"][0] == {
        "token_id": record["token_ids"][0], "token": "y", "logprob": -0.5, "top": [],
    }  # fmt: skip
    assert "logprobs" not in by_id[2]


def test_several_samples_are_choices(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x", "n": 3, "max_tokens": 2})
    assert files.run(FakeEngine(tokenizer)) == 0
    (record,) = files.records()
    assert [choice["index"] for choice in record["choices"]] == [0, 1, 2]
    assert record["choices"][2]["text"] == "xx"
    assert record["usage"]["completion_tokens"] == 6


def test_openai_lines(files, tokenizer) -> None:
    files.write(chat_line("c1", logprobs=True), chat_line("c2", tools=[{"type": "function"}]))
    assert files.run(FakeEngine(tokenizer)) == 1
    by_id = {record["custom_id"]: record for record in files.records()}
    good, bad = by_id["c1"], by_id["c2"]
    assert good["error"] is None
    assert good["response"]["status_code"] == 200
    body = good["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "sps2-tiny")
    assert body["choices"][0]["message"]["content"] == "::"
    assert len(body["choices"][0]["logprobs"]["content"]) == 2
    assert good["timings"]["total_s"] >= 0
    assert "tools" in bad["error"]["message"]
    assert bad["response"]["status_code"] == 400
    assert "tools" in bad["response"]["body"]["error"]["message"]


def test_a_bad_line_does_not_stop_the_rest(files, tokenizer) -> None:
    files.write(
        "{",
        {"id": "ok", "prompt": "x"},
        {"id": "ok", "prompt": "again"},
        {"id": "long", "prompt": "x" * 64},
        {"id": "empty", "prompt": []},
        {"id": "half", "prompt": "\ud800"},
    )
    engine = FakeEngine(tokenizer)
    assert files.run(engine) == 1
    records = files.records()
    errors = {
        record["error"]["line"]: record["error"]["message"]
        for record in records
        if "error" in record
    }
    assert sorted(errors) == [1, 3, 4, 5, 6]
    assert "already used in line 2" in errors[3]
    assert "65 tokens" in errors[4] and "limit 64" in errors[4]
    assert "no tokens" in errors[5]
    assert "surrogates" in errors[6]
    assert [record["id"] for record in records if "error" not in record] == ["ok"]
    assert len(engine.seen) == 1


def test_text_without_tokenizer_is_an_error_and_tokens_are_not(files) -> None:
    files.write(
        {"id": 1, "prompt": "x"}, {"id": 2, "prompt": [5]}, {"id": 3, "prompt": [5], "stop": "x"}
    )
    assert files.run(FakeEngine(None)) == 1
    by_id = {record["id"]: record for record in files.records()}
    assert "--tokenizer" in by_id[1]["error"]["message"]
    assert by_id[2]["token_ids"] == [5] * 16
    assert "stop strings" in by_id[3]["error"]["message"]


def test_requests_in_flight_are_bounded(files, tokenizer) -> None:
    files.write(*({"prompt": "x", "n": 1 + i % 2} for i in range(100)))
    engine = FakeEngine(tokenizer)
    assert files.run(engine) == 0
    assert len(files.records()) == 100
    assert 2 <= engine.most_in_flight <= 4 * CONFIG.scheduler.max_running + 1


def test_a_full_queue_only_delays(files, tokenizer) -> None:
    files.write(*({"prompt": "x"} for _ in range(7)))
    engine = FakeEngine(tokenizer, max_queue=2)
    assert files.run(engine) == 0
    assert len(engine.seen) == 7


def test_seeds_follow_from_the_id_alone(files, tokenizer) -> None:
    files.write(
        {"id": "a", "prompt": "x"},
        {"id": "b", "prompt": "x"},
        {"id": "c", "prompt": "x", "seed": 5},
    )
    engine = FakeEngine(tokenizer)
    files.run(engine)
    seeds = [params.seed for params in engine.seen.values()]
    assert seeds == [derive_seed_from_text(0, "a"), derive_seed_from_text(0, "b"), 5]
    assert len(set(seeds)) == 3
    assert derive_seed_from_text(1, "a") != derive_seed_from_text(0, "a")


def test_finished_lines_survive_a_crash_and_resume_adds_the_rest(files, tokenizer) -> None:
    files.write(*({"id": f"r{i}", "prompt": "x", "max_tokens": 1 + i % 3} for i in range(30)))
    with pytest.raises(RuntimeError, match="out of memory"):
        files.run(FakeEngine(tokenizer, die_after=4))
    done = len(files.records())
    assert 0 < done < 30
    engine = FakeEngine(tokenizer)
    assert files.run(engine, mode=OutputMode.RESUME) == 0
    assert len(engine.seen) == 30 - done
    assert sorted(record["id"] for record in files.records()) == sorted(f"r{i}" for i in range(30))


def test_resume_after_a_cut_at_any_byte(files, tokenizer) -> None:
    lines = [{"id": f"é{i}", "prompt": "x"} for i in range(6)]
    files.write(*lines, "{", {"id": "é0", "prompt": "twice"}, chat_line("c"))
    assert files.run(FakeEngine(tokenizer)) == 1
    whole = files.output.read_bytes()
    expected = sorted(json.dumps(key(record)) for record in files.records())
    rng = random.Random(5)
    for cut in [0, 1, len(whole) - 1, len(whole), *(rng.randrange(len(whole)) for _ in range(40))]:
        files.output.write_bytes(whole[:cut])
        assert files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME) == 1
        assert sorted(json.dumps(key(record)) for record in files.records()) == expected, cut


def key(record: dict) -> list:
    line = (record.get("error") or {}).get("line")
    return [record.get("custom_id", record.get("id")), line]


def test_resume_with_nothing_left(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.run(FakeEngine(tokenizer))
    job = BatchJob.prepare(
        BatchOptions(input=files.input, output=files.output, mode=OutputMode.RESUME), CONFIG
    )
    assert (job.num_left, job.exit_code) == (0, 0)
    job.close()


def test_retry_errors_replaces_error_records(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y" * 70}, "{")
    assert files.run(FakeEngine(tokenizer)) == 1
    assert files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME) == 1
    assert len(files.records()) == 3
    roomy = FakeEngine(tokenizer, max_model_len=100)
    assert files.run(roomy, mode=OutputMode.RESUME, retry_errors=True) == 1
    records = files.records()
    assert sorted(str(record["id"]) for record in records) == ["3", "a", "b"]
    assert [record["id"] for record in records if "error" in record] == [3]
    assert not list(files.output.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": CONFIG.replace(seed=1)}, "seed was 0, now 1"),
        ({"config": CONFIG.replace(model="other")}, "model was"),
        ({"config": CONFIG.replace(dtype="float32")}, "dtype"),
        ({"sampling": {"temperature": 0.5}}, "sampling was"),
        ({"input": {"id": "z", "prompt": "z"}}, "input_sha256"),
    ],
)
def test_resume_refuses_what_would_mix_answers(files, tokenizer, change, named) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.run(FakeEngine(tokenizer))
    before = files.output.read_bytes()
    if "input" in change:
        files.write(change.pop("input"))
    with pytest.raises(ConfigError, match=named):
        files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME, **change)
    assert files.output.read_bytes() == before


def test_other_degrees_may_resume(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.run(FakeEngine(tokenizer))
    more = CONFIG.replace(scheduler=SchedulerConfig(max_running=9), transport="gather")
    assert files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME, config=more) == 0


def test_existing_output_needs_a_decision(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.run(FakeEngine(tokenizer))
    with pytest.raises(ConfigError, match="--resume continues it, --overwrite"):
        files.run(FakeEngine(tokenizer))
    assert files.run(FakeEngine(tokenizer), mode=OutputMode.OVERWRITE) == 0
    assert len(files.records()) == 1


def test_an_empty_output_is_nobodys_work(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.output.touch()
    assert files.run(FakeEngine(tokenizer)) == 0
    files.output.unlink()
    assert files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME) == 0
    assert len(files.records()) == 1


def test_resume_needs_its_state_and_our_records(files, tokenizer) -> None:
    files.write({"id": "a", "prompt": "x"})
    files.run(FakeEngine(tokenizer))
    with files.output.open("a") as file:
        file.write("[]\n")
    with pytest.raises(ConfigError, match="line 2: not a record"):
        files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME)
    state_path(files.output).unlink()
    with pytest.raises(ConfigError, match=r"state\.json"):
        files.run(FakeEngine(tokenizer), mode=OutputMode.RESUME)


def test_files_that_cannot_work(files, tokenizer, tmp_path) -> None:
    def prepare(**options: object) -> None:
        BatchJob.prepare(
            BatchOptions(**{"input": files.input, "output": files.output, **options}), CONFIG
        )

    with pytest.raises(ConfigError, match="not a file"):
        prepare()
    files.write({"id": "a", "prompt": "x"})
    link = tmp_path / "link.jsonl"
    link.symlink_to(files.input)
    with pytest.raises(ConfigError, match="same file"):
        prepare(output=link, mode=OutputMode.OVERWRITE)
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(output=tmp_path / "no" / "out.jsonl")
    with pytest.raises(ConfigError, match="not a file"):
        prepare(output=tmp_path)
    with pytest.raises(ConfigError, match="--limit"):
        prepare(limit=0)
    assert json.loads(files.input.read_text())["id"] == "a"


def test_two_runs_cannot_share_an_output(files) -> None:
    files.write({"id": "a", "prompt": "x"})
    first = BatchOutput.open(files.output, mode=OutputMode.NEW, fingerprint={})
    with pytest.raises(ConfigError, match="another run"):
        BatchOutput.open(files.output, mode=OutputMode.OVERWRITE, fingerprint={})
    first.close()
    BatchOutput.open(files.output, mode=OutputMode.OVERWRITE, fingerprint={}).close()


def test_ids_that_are_not_unicode_are_still_written(files, tokenizer) -> None:
    files.write({"id": "\ud800", "prompt": "x"})
    assert files.run(FakeEngine(tokenizer)) == 0
    assert files.records()[0]["id"] == "\ud800"


def test_each_line_is_on_disk_as_soon_as_it_is_answered(files, tokenizer) -> None:
    files.write(
        {"id": "a", "prompt": "x", "max_tokens": 1}, {"id": "b", "prompt": "x", "max_tokens": 9}
    )
    engine = FakeEngine(tokenizer)
    seen = []
    step = engine.step

    def watched() -> list:
        seen.append(len(files.output.read_text().splitlines()))
        return step()

    engine.step = watched
    files.run(engine)
    assert seen[0] == 0 and seen[1] == 1 and seen[-1] == 1


def test_shown_answers(files, tokenizer, capsys) -> None:
    files.write({"id": "a", "prompt": "x", "max_tokens": 2}, "{", {"id": "b", "prompt": "y"})
    files.run(FakeEngine(tokenizer), show=2)
    out = capsys.readouterr().out
    assert "[2] error: not JSON" in out and "[a] xx" in out and "[b]" not in out
