"""Lines of a batch file, simple or in OpenAI's batch format, with the errors of malformed ones.

The file is read twice and never held: `scan` checks every line before a model
is loaded, `read_lines` yields them afterwards. No tokenizer is needed, so
lengths in tokens are not checked here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.serving.protocol import Kind, ParsedRequest, parse_request

URLS: Mapping[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

LineId = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodLine:
    """A request of line `number` (from 1); `line_id` is returned unchanged."""

    number: int
    line_id: LineId
    openai: bool
    request: ParsedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that gets an error record instead of an answer."""

    number: int
    line_id: LineId
    openai: bool
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Result of one pass over the file; `bad` maps line numbers to their lines."""

    num_lines: int
    sha256: str
    bad: dict[int, BadLine] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)


def scan(path: Path, defaults: Mapping[str, Any], *, limit: int | None = None) -> Scan:
    """Check all lines (the first `limit` that are not blank); the hash covers the whole file.

    Raises:
        ConfigError: the file cannot be read.
    """
    digest = hashlib.sha256()
    bad: dict[int, BadLine] = {}
    warnings: dict[str, int] = {}
    first_use: dict[str, int] = {}
    num_lines = 0
    for number, raw in _raw_lines(path):
        digest.update(raw)
        if not raw.strip() or (limit is not None and num_lines >= limit):
            continue
        num_lines += 1
        line = parse_line(number, raw, defaults)
        if isinstance(line, GoodLine):
            for warning in line.request.warnings:
                warnings[warning] = warnings.get(warning, 0) + 1
            earlier = first_use.setdefault(str(line.line_id), number)
            if earlier != number:
                line = BadLine(
                    number=number,
                    line_id=line.line_id,
                    openai=line.openai,
                    error=f"id {line.line_id!r} was already used in line {earlier}",
                )
        if isinstance(line, BadLine):
            bad[number] = line
    return Scan(num_lines=num_lines, sha256=digest.hexdigest(), bad=bad, warnings=warnings)


def read_lines(
    path: Path, defaults: Mapping[str, Any], found: Scan, *, limit: int | None = None
) -> Iterator[GoodLine | BadLine]:
    """Yield the lines, with duplicates as found by `scan`."""
    count = 0
    for number, raw in _raw_lines(path):
        if not raw.strip():
            continue
        if limit is not None and count >= limit:
            return
        count += 1
        yield found.bad.get(number) or parse_line(number, raw, defaults)


def parse_line(number: int, raw: bytes, defaults: Mapping[str, Any]) -> GoodLine | BadLine:
    """Parse a line that is not blank; errors are returned as a bad line, never raised."""
    openai, line_id = False, cast(LineId, number)
    try:
        record = _json_object(raw)
        openai = "custom_id" in record or ("body" in record and "url" in record)
        line_id = _line_id(record, "custom_id" if openai else "id", number)
        request = _openai_request(record, defaults) if openai else _simple_request(record, defaults)
    except RequestError as error:
        return BadLine(number=number, line_id=line_id, openai=openai, error=str(error))
    return GoodLine(number=number, line_id=line_id, openai=openai, request=request)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise ConfigError(f"input {path} cannot be read: {error.strerror}") from error


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise RequestError("not JSON that can be read: nested too deeply") from None
    if not isinstance(record, dict):
        raise RequestError(f"a line must be a JSON object, not a {type(record).__name__}")
    return record


def _refuse_constant(name: str) -> None:
    raise RequestError(f"not JSON: {name} is no JSON number")


def _line_id(record: dict[str, Any], name: str, number: int) -> LineId:
    value = record.get(name)
    if value is None:
        return number
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RequestError(f"{name} must be a string or an integer, got {str(value)[:80]!r}")
    return value


def _simple_request(record: dict[str, Any], defaults: Mapping[str, Any]) -> ParsedRequest:
    return parse_request(
        {name: value for name, value in record.items() if name != "id"}, defaults=defaults
    )


def _openai_request(record: dict[str, Any], defaults: Mapping[str, Any]) -> ParsedRequest:
    url, method, body = record.get("url"), record.get("method", "POST"), record.get("body")
    if method != "POST":
        raise RequestError(f"method must be POST, got {str(method)[:80]!r}")
    if not isinstance(url, str) or url not in URLS:
        raise RequestError(f"url must be one of {', '.join(URLS)}, got {str(url)[:80]!r}")
    if not isinstance(body, dict):
        raise RequestError(f"body must be a JSON object, got {type(body).__name__}")
    return parse_request(body, kind=URLS[url], defaults=defaults)
