"""Readers of published request traces: recognise the format, one `Arrival` per row.

    Mooncake      JSON lines: timestamp (ms), input_length, output_length, hash_ids (of 512 tokens)
    Qwen-Bailian  JSON lines: chat_id, timestamp (s), input_length, output_length, hash_ids (of 16)
    Azure         CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT      CSV: Timestamp (s), Request tokens, Response tokens, ..
    ServeGen      CSV without a header: statistics, from which `servegen` draws

Files may be gzipped. Times begin at 0 and rows are sorted by them. Rates and lengths stay as they
are (`arrivals.scaled` changes them).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from sps2_mega.bundled import bundled_folders
from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.servegen import draw_arrivals, read_windows

BUNDLED = {
    "mooncake": "mooncake_conversation.jsonl.gz",
    "mooncake-synthetic": "mooncake_synthetic.jsonl.gz",
    "azure-code": "azure2023_code.csv.gz",
    "azure-conversation": "azure2023_conv.csv.gz",
    "servegen": "servegen_r1_client65-trace.csv",
}
_TICK_S = 3.0  # Mooncake's times are that coarse
_Row = tuple[float, int, int, tuple[int, ...], int]


def trace_path(name: str) -> Path:
    """The file of a bundled trace or at a path.

    Raises:
        ConfigError: neither a bundled name nor a file.
    """
    path = Path(name)
    if name in BUNDLED:
        places = [folder / BUNDLED[name] for folder in bundled_folders("traces")]
        path = next((place for place in places if place.is_file()), places[-1])
    if not path.is_file():
        raise ConfigError(f"{name!r} is neither a file nor one of {', '.join(sorted(BUNDLED))}")
    return path


def read_trace(name: str, *, limit: int | None = None, seed: int = 0) -> list[Arrival]:
    """Read the first `limit` requests of a bundled trace or a file.

    `seed` matters where requests are drawn (ServeGen). Rows without tokens in or out are left out:
    they were refused or failed where the trace was taken.

    Raises:
        ConfigError: no such file, no known format, or a row that cannot be read.
    """
    path = trace_path(name)
    lines = text_of(path).splitlines()
    if not lines:
        raise ConfigError(f"{path} is empty")
    head = lines[0].lstrip("\ufeff")
    if head.startswith("{"):
        rows = _json_rows(lines, path)
    elif "ContextTokens" in head or "Request tokens" in head:
        rows = _csv_rows(lines, path)
    elif head.count(",") == 5 and path.name.endswith("-trace.csv"):
        windows = read_windows(lines, _dataset_text(path), str(path))
        return list(itertools.islice(draw_arrivals(windows, seed=seed), limit))
    else:
        raise ConfigError(
            f"{path} begins with {head[:60]!r}: not a trace of Mooncake, Qwen-Bailian, Azure, "
            "BurstGPT or ServeGen"
        )
    kept = [row for row in rows if row[1] >= 1 and row[2] >= 1]
    return _arrivals(kept)[:limit]


def text_of(path: Path) -> str:
    """Read a text file, unpacking names that end with .gz.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return file.read()
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            # Bailian's rows name their chat, and count seconds and blocks of 16.
            unit, block = (1.0, 16) if "chat_id" in row else (1e-3, 512)
            names = tuple(map(int, row.get("hash_ids", ())))
            lengths = int(row["input_length"]), int(row["output_length"])
            if names and len(names) * block < lengths[0]:
                raise ValueError(f"{len(names)} names of {block} tokens for {lengths[0]} tokens")
            yield float(row["timestamp"]) * unit, *lengths, names, block
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number}: {error!r}") from None


def _csv_rows(lines: Iterable[str], path: Path) -> Iterator[_Row]:
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            if "ContextTokens" in row:
                yield _azure(row)
            else:
                lengths = int(row["Request tokens"]), int(row["Response tokens"])
                yield float(row["Timestamp"]), *lengths, (), 1
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: {error!r}") from None


def _azure(row: Mapping[str, str]) -> _Row:
    # Seven digits of a second are one more than datetime takes; a zone may follow, or no fraction
    # be there.
    moment, _, fraction = row["TIMESTAMP"].partition(".")
    digits = "".join(itertools.takewhile(str.isdigit, fraction))
    zone = fraction[len(digits) :]
    time_s = datetime.fromisoformat(moment + (zone or ("" if "+" in moment else "+00:00")))
    seconds = time_s.timestamp() + (float(f"0.{digits}") if digits else 0.0)
    return seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]), (), 1


def _arrivals(rows: list[_Row]) -> list[Arrival]:
    """Arrivals in order of time from 0 on; names are renumbered, as some traces have huge ones."""
    rows.sort(key=lambda row: row[0])
    start = rows[0][0] if rows else 0.0
    numbers: dict[int, int] = {}
    arrivals = [
        Arrival(
            time_s=time_s - start,
            prompt_len=prompt_len,
            output_len=output_len,
            hash_ids=tuple(numbers.setdefault(name, len(numbers)) for name in names),
            hash_block=block,
        )
        for time_s, prompt_len, output_len, names, block in rows
    ]
    return _spread(arrivals)


def _spread(arrivals: list[Arrival]) -> list[Arrival]:
    """Spread the requests of one tick of a coarse clock evenly until the next tick.

    A burst every 3 s would be an artefact.
    """
    spread: list[Arrival] = []
    ticks = [list(group) for _, group in itertools.groupby(arrivals, key=lambda a: a.time_s)]
    for number, group in enumerate(ticks):
        room = _TICK_S
        if number + 1 < len(ticks):
            room = min(room, ticks[number + 1][0].time_s - group[0].time_s)
        spread += [
            replace(arrival, time_s=arrival.time_s + room * place / len(group))
            for place, arrival in enumerate(group)
        ]
    return spread


def _dataset_text(path: Path) -> str:
    """Text of the lengths that belong to a ServeGen client's arrivals."""
    stem = path.name.removesuffix("-trace.csv")
    for name in (f"{stem}-dataset.json", f"{stem}-dataset.json.gz"):
        if (path.parent / name).is_file():
            return text_of(path.parent / name)
    raise ConfigError(f"{path} needs {stem}-dataset.json beside it")
