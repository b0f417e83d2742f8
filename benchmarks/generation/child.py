"""Offline generation in a process of its own, through the public `LLM` of the checkout under test.

    python -P child.py < JOB.json        JOB is {"checkout": FOLDER, "models": [MODEL, ...]}

PYTHONPATH must lead to that checkout. A MODEL is loaded, answers one warm-up prompt, then every
batch in order. Its fields: `model`, `sp`, `options` (of LLM), and `batches`, lists of {"prompt":
text or token ids, "params": fields of SamplingParams}. Each line of standard output that begins
with MARK holds JSON: first the time of the warm-up's token on the clock of `time.monotonic`, then
one line per batch. Nothing but the checkout's public API is imported, so that older commits are
measured by the same code.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MARK = "@@ "
_WARM_UP = list(range(3, 11))


def main() -> None:
    job = json.load(sys.stdin)
    import sps2_mega

    found = Path(sps2_mega.__file__).resolve().parents[1]
    if found != Path(job["checkout"]).resolve():
        raise SystemExit(f"sps2_mega of {found} was imported, not of {job['checkout']}")
    for model in job["models"]:
        run(model)


def run(model: dict[str, Any]) -> None:
    from sps2_mega.serving.llm import LLM
    from sps2_mega.types import SamplingParams

    with LLM(model["model"], sp=model["sp"], **model["options"]) as llm:
        llm.generate([_WARM_UP], SamplingParams(max_tokens=1, temperature=0.0))
        say({"first_token_at": time.monotonic()})
        for batch in model["batches"]:
            outputs = llm.generate(
                [request["prompt"] for request in batch],
                [SamplingParams(**request["params"]) for request in batch],
            )
            errors = [output.error for output in outputs if output.error is not None]
            if errors:
                raise SystemExit(f"{model['model']}: {errors[0]}")
            say(measured(outputs))


def measured(outputs: list[Any]) -> dict[str, Any]:
    """Seconds until all first tokens, then until all last ones; token counts, and the tokens."""
    timings = [output.completions[0].timings for output in outputs]
    prefill_s = max(timing.ttft_s for timing in timings)
    tokens = [output.completions[0].token_ids for output in outputs]
    return {
        "prefill_s": prefill_s,
        "decode_s": max(timing.total_s for timing in timings) - prefill_s,
        "prefill_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "decode_tokens": sum(len(row) - 1 for row in tokens),
        "tokens": tokens,
    }


def say(answer: dict[str, Any]) -> None:
    print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
