"""Offline generation from Python: prompts in, finished outputs back, in order.

LLM(model)                      one rank, in this process
LLM(model, tp=2, sp=2)          plain python: three children are started, this process is rank 0
LLM(model, sp=2) in each rank   under deepspeed or torchrun: the constructor returns on rank 0 only;
                                on other ranks it follows rank 0, then raises SystemExit(0)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from sps2_mega.config import EngineConfig
from sps2_mega.config_mapping import parts_of_engine_config
from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.serving.drive import Submission, drive
from sps2_mega.serving.protocol import parse_request
from sps2_mega.types import SamplingParams

Prompt = str | list[int]
Message = dict[str, Any]


class LLM:
    """A loaded model. Use it as a context manager or call `close`: ranks live until then."""

    def __init__(self, model: str, *, tp: int = 1, sp: int = 1, **options: Any) -> None:
        """Load `model` (a folder or a name in model_configs/) on tp * sp ranks.

        `options` are fields of EngineConfig and of its parts: dtype, seed,
        max_model_len, num_blocks, ...; a part can also be given whole, as
        csa=CSAConfig(...). `decode_ranks` adds as many ranks.

        Raises:
            ConfigError, CheckpointError: it cannot work; the message says why.
            SystemExit: on ranks of a launcher other than rank 0, after rank 0 has closed.
        """
        from sps2_mega.engine.start import run_worker, start_driver

        self.config = engine_config(model, tp=tp, sp=sp, options=options)
        self._ranks = None
        info = from_environment()
        if info.launcher == "none" and self.config.parallel.world_size > 1:
            from sps2_mega.serving.local_ranks import LocalRanks

            self._ranks = LocalRanks(self.config)
            info = self._ranks.info
        if info.rank > 0:
            run_worker(self.config, info)
            sys.exit(0)
        try:
            self._engine = start_driver(self.config, info)
        except BaseException:
            if self._ranks is not None:
                self._ranks.close(told=False)
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate one output per prompt (text, or a list of token ids), in order.

        Refused prompts have `error` set.

        Raises:
            RequestError: prompts and params do not match, or text was given without a tokenizer.
        """
        listed = as_prompts(prompts)
        return self._run([self._tokens(prompt) for prompt in listed], params)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next assistant message of one or several conversations, as `generate`.

        Raises:
            RequestError: messages are malformed, or the chat template refuses them.
        """
        single = bool(conversations) and isinstance(conversations[0], dict)
        listed = [conversations] if single else conversations
        tokenizer = self._tokenizer()
        tokens = [
            tokenizer.apply_chat_template(
                parse_request({"messages": list(messages)}, kind="chat").messages
            )
            for messages in listed
        ]
        return self._run(tokens, params)

    def close(self) -> None:
        """End all ranks; safe to call twice."""
        self._engine.shutdown()
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        each = params_for(len(prompts), params)

        def source() -> Iterator[Submission | RequestOutput]:
            for index, (tokens, one) in enumerate(zip(prompts, each, strict=True)):
                yield Submission(request_id=str(index), prompt_token_ids=tokens, params=one)

        finished = {
            int(output.request_id): output
            for output in drive(
                self._engine, source(), max_in_flight=4 * self.config.scheduler.max_running
            )
        }
        return [finished[index] for index in range(len(prompts))]

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self._tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _tokenizer(self) -> Any:
        if self._engine.tokenizer is None:
            raise RequestError(
                f"{self.config.model} has no tokenizer: give token ids, or a folder as tokenizer="
            )
        return self._engine.tokenizer


def engine_config(model: str, *, tp: int, sp: int, options: dict[str, Any]) -> EngineConfig:
    """EngineConfig from flat options, each assigned to the part that has a field of that name.

    A field with a flag of another name is also known by that, as `gpu_memory_utilization`.

    Raises:
        ConfigError: no part has such a field (the known ones are listed), or one is given twice.
    """
    values: dict[str, Any] = {}
    nested = parts_of_engine_config()
    left = _by_field(options, nested)
    for part, cls in nested.items():
        if part in left and part != "parallel":
            values[part] = left.pop(part)
            continue
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: left.pop(name) for name in sorted(names & left.keys())}
        values[part] = cls(**given, **({"tp": tp, "sp": sp} if part == "parallel" else {}))
    known = {field.name for field in dataclasses.fields(EngineConfig)} - nested.keys() - {"model"}
    unknown = sorted(left.keys() - known)
    if unknown:
        parts = {f.name for cls in nested.values() for f in dataclasses.fields(cls)}
        raise ConfigError(
            f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known | parts))}"
        )
    return EngineConfig(model=model, **values, **left)


def _by_field(options: dict[str, Any], nested: dict[str, type]) -> dict[str, Any]:
    """Options with the spellings of flags replaced by field names; names of parts stay parts."""
    spellings = {
        field.metadata["flag"]["name"].replace("-", "_"): field.name
        for part in (*nested.values(), EngineConfig)
        for field in dataclasses.fields(part)
        if field.metadata.get("flag", {}).get("name") not in (None, *nested)
    }
    for spelling, name in spellings.items():
        if spelling in options and name in options:
            raise ConfigError(f"{spelling} and {name} are the same option: give one of them")
    return {spellings.get(name, name): value for name, value in options.items()}


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; a single prompt becomes a list of one.

    A list of integers is a single prompt.
    """
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
        return [listed]  # type: ignore[list-item]
    for index, item in enumerate(listed):
        if not isinstance(item, str | list | tuple):
            raise RequestError(
                f"prompt {index} must be text or a list of token ids, got {type(item).__name__}"
            )
    return listed  # type: ignore[return-value]


def params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    """One SamplingParams per prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts need {count} SamplingParams or one, got {len(params)}")
    return list(params)
