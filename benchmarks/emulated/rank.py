"""A rank of an emulated cluster, with prompts on rank 0's stdin and measurements on its stdout.

`python benchmarks/emulated/rank.py PARENT CONFIG` with the starting process's id and EngineConfig
in JSON. Prompts, with their numbers of new tokens, and measurements are JSON lines. Started by
`emulated.jobs`. The job ends when stdin of rank 0 closes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sps2_mega.comm.parent_watch import PR_SET_PDEATHSIG

NUM_LOGPROBS = 8


def answer(engine: Any, number: int, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    """Measurements of one prompt, computed in full: seconds, token gaps, likeliest first tokens."""
    from sps2_mega.types import SamplingParams

    before = engine.stats()
    params = SamplingParams(
        max_tokens=new_tokens, temperature=0.0, logprobs=NUM_LOGPROBS, ignore_eos=True
    )
    refused = engine.add_request(str(number), tokens, params)
    if refused is not None:
        return {"error": f"{refused.value} (prompt of {len(tokens)} tokens)"}
    outputs: list[Any] = []
    while engine.has_work():
        outputs += engine.step()
    after = engine.stats()
    computed = after.prompt_tokens - before.prompt_tokens
    assert computed == len(tokens), f"{computed} of {len(tokens)} prompt tokens were computed"
    [found] = outputs[0].completions
    comm, earlier = after.prefill_comm, before.prefill_comm
    return {
        "ttft_s": found.timings.ttft_s,
        "gaps_s": list(found.timings.gaps_s),
        "exposed_comm_s": comm.exposed_comm_s - earlier.exposed_comm_s,
        "total_comm_s": comm.total_comm_s - earlier.total_comm_s,
        "logprobs": [[token, value] for token, value in found.logprobs[0].top],
    }


def end_with(parent: int) -> None:
    """Let this process die with the one that started it, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it was faster
        sys.exit(1)


def main() -> int:
    from sps2_mega.comm.guard import guard
    from sps2_mega.config_mapping import engine_config_from_mapping
    from sps2_mega.engine.start import driver_of, worker_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.parallel.launcher import from_environment

    end_with(int(sys.argv[1]))
    with guard(from_environment()):
        config = engine_config_from_mapping(json.loads(sys.argv[2]))
        started = start_rank(config, from_environment(), show_progress=False)
        if started.groups.global_rank > 0:
            worker_of(started).run()
            return 0
        engine = driver_of(started)
        _tell({"ready": True})
        for number, line in enumerate(sys.stdin):
            _tell(answer(engine, number, **json.loads(line)))
        engine.shutdown()
    return 0


def _tell(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
