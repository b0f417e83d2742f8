from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.serving.batch_input import BadLine, GoodLine, parse_line, read_lines, scan


def openai(custom_id: object, **fields: object) -> dict:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    } | fields


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_both_kinds_of_lines_mixed(tmp_path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "x", "max_tokens": 3},
        openai("b"),
        "",
        {"prompt": [1, 2]},
        {"id": 7, "messages": [{"role": "user", "content": "x"}]},
        openai("c", url="/v1/completions", body={"prompt": "y"}),
    )
    found = scan(path, {})
    assert (found.num_lines, found.bad) == (5, {})
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    lines = list(read_lines(path, {}, found))
    assert [(line.number, line.line_id, line.openai) for line in lines] == [
        (1, "a", False),
        (2, "b", True),
        (4, 4, False),
        (5, 7, False),
        (6, "c", True),
    ]
    assert [line.request.kind for line in lines] == [
        "completion",
        "chat",
        "completion",
        "chat",
        "completion",
    ]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "object, not a list"),
        (b"\xff\xfe", "not UTF-8 .byte 1"),
        (b'{"id": "a", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"id": [1], "prompt": "x"}', "id must be"),
        (b'{"id": true, "prompt": "x"}', "id must be"),
        (b'{"id": "a"}', "prompt or messages"),
        (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url must be"),
        (b'{"custom_id": "a", "body": {}}', "url must be"),
        (b'{"custom_id": "a", "url": "/v1/completions"}', "body must be"),
        (b'{"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}', "method"),
        (
            b'{"custom_id": "a", "url": "/v1/completions",'
            b' "body": {"prompt": "x", "stream": true}}',
            "stream",
        ),
        (b"[" * 100_000, "nested"),
    ],
)
def test_bad_lines_say_what_is_wrong(raw, said) -> None:
    line = parse_line(3, raw, {})
    assert isinstance(line, BadLine)
    assert line.number == 3
    assert said.split(" .")[0] in line.error


def test_bad_line_keeps_its_id_and_kind() -> None:
    line = parse_line(1, json.dumps(openai("q", method="GET")).encode(), {})
    assert (line.line_id, line.openai) == ("q", True)
    line = parse_line(1, b'{"id": "q", "prompt": "x", "tools": [1]}', {})
    assert (line.line_id, line.openai) == ("q", False)


def test_later_of_two_equal_ids_is_bad(tmp_path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"id": "1", "prompt": "x"},
        {"id": 1, "prompt": "y"},
        openai("1"),
        {"id": "2"},
        {"id": "2", "prompt": "the one before was bad"},
    )
    found = scan(path, {})
    assert sorted(found.bad) == [2, 3, 4]
    assert "line 1" in found.bad[2].error
    kinds = [type(line) for line in read_lines(path, {}, found)]
    assert kinds == [GoodLine, BadLine, BadLine, BadLine, GoodLine]


def test_limit_counts_requests_but_hashes_everything(tmp_path) -> None:
    path = write(tmp_path / "in.jsonl", "", *({"prompt": str(i)} for i in range(5)))
    found = scan(path, {}, limit=2)
    assert found.num_lines == 2
    assert found.sha256 == scan(path, {}).sha256
    assert [line.number for line in read_lines(path, {}, found, limit=2)] == [2, 3]


def test_byte_order_mark_crlf_and_missing_last_newline(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "y"}')
    found = scan(path, {})
    assert (found.num_lines, found.bad) == (2, {})


def test_warnings_are_counted(tmp_path) -> None:
    path = write(tmp_path / "in.jsonl", *({"prompt": "x", "colour": 1} for _ in range(3)))
    assert scan(path, {}).warnings == {"unknown field 'colour' ignored": 3}


def test_defaults_reach_the_lines(tmp_path) -> None:
    path = write(tmp_path / "in.jsonl", {"prompt": "x"}, {"prompt": "x", "max_tokens": 2})
    lines = list(read_lines(path, {"max_tokens": 9}, scan(path, {})))
    assert [line.request.params.max_tokens for line in lines] == [9, 2]


def test_unreadable_input(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        scan(tmp_path / "absent.jsonl", {})
