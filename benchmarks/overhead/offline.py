"""Offline generation in a process of its own that takes batches in turn with another contestant.

Run as a program it is that process. It takes the engine flags of launch/serve.py, then JSON lines
on standard input, each a list of (prompt, number of new tokens), and answers each with its seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
_ANSWER = "seconds: "


class OfflineProcess:
    """A loaded model that generates on request; a context manager."""

    def __init__(self, model: str, flags: list[str]) -> None:
        """Start the process; `flags` are the engine's, as launch/serve.py takes them."""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--model", model, *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def seconds(self, asks: list[tuple[str, int]]) -> float:
        """Seconds to answer all prompts, each with its number of tokens.

        Raises:
            RuntimeError: the process ended; its log is on standard error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asks) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return float(line.removeprefix(_ANSWER))
        raise RuntimeError(f"offline generation ended with exit code {self._process.wait()}")

    def __enter__(self) -> OfflineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    from sps2_mega.cli.flags import config_from
    from sps2_mega.cli.serve import serve_parser
    from sps2_mega.config import EngineConfig
    from sps2_mega.serving.llm import LLM
    from sps2_mega.types import SamplingParams

    config = config_from(EngineConfig, serve_parser().parse_args(sys.argv[1:]))
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(EngineConfig)
        if field.name not in ("model", "parallel")
    }
    with LLM(config.model, tp=config.parallel.tp, sp=config.parallel.sp, **options) as llm:
        for line in sys.stdin:
            prompts, lengths = zip(*json.loads(line), strict=True)
            params = [
                SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
                for length in lengths
            ]
            began = time.perf_counter()
            outputs = llm.generate(prompts, params)
            seconds = time.perf_counter() - began
            found = tuple(len(output.completions[0].token_ids) for output in outputs)
            assert found == lengths, found
            print(f"{_ANSWER}{seconds}", flush=True)


if __name__ == "__main__":
    main()
