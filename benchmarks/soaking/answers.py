"""Expected answers of a soak: the same requests through launch/generate.py, on one rank.

Prompts are Python source of the standard library, of very different lengths. Most requests are
greedy; some are sampled with a seed, which gives the same tokens whatever else runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.generation.workload import source_prompts
from benchmarks.soaking.cases import Answer

_ROOT = Path(__file__).resolve().parents[2]
_NEW_TOKENS = (1, 5, 16, 40)


def known_answers(
    model: str, flags: list[str], folder: Path, *, num_prompts: int, longest: int
) -> list[Answer]:
    """Generate the answers; `flags` are the engine's besides model and degrees.

    Raises:
        RuntimeError: generation failed.
    """
    lines = requests(num_prompts, longest)
    asked, told = folder / "asked.jsonl", folder / "answers.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(asked), "--output", str(told), "--overwrite"]
    ended = subprocess.run(
        [sys.executable, str(_ROOT / "launch" / "generate.py"), "--model", model, *files, *flags],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise RuntimeError(f"offline generation failed:\n{ended.stderr[-2000:]}")
    return answers_of(lines, told)


def requests(num_prompts: int, longest: int) -> list[dict[str, Any]]:
    """Lines of an input file: every prompt with each number of new tokens; every fourth is sampled.

    The first prompt is one character; the others have 2 to `longest`.
    """
    texts = ["x", *source_prompts(num_prompts - 1, 2, longest)]
    lines = []
    for number, text in enumerate(texts):
        for count in _NEW_TOKENS:
            sampling = (
                {"temperature": 0.8, "seed": number} if number % 4 == 3 else {"temperature": 0}
            )
            fields = {"prompt": text, "max_tokens": count, "ignore_eos": True, **sampling}
            lines.append({"id": f"{number}-{count}", **fields})
    return lines


def answers_of(lines: list[dict[str, Any]], told: Path) -> list[Answer]:
    """Known answers from an output file of generate.py.

    Raises:
        RuntimeError: a line has no answer.
    """
    records = {record["id"]: record for record in map(json.loads, told.read_text().splitlines())}
    answers = []
    for line in lines:
        record = records.get(line["id"], {})
        if "text" not in record:
            raise RuntimeError(f"no answer to {line['id']}: {record.get('error')}")
        fields = {name: value for name, value in line.items() if name != "id"}
        answers.append(
            Answer(fields=fields, text=record["text"], num_tokens=len(record["token_ids"]))
        )
    return answers
