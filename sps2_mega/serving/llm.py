"""Offline generation from Python: prompts in, finished outputs back, in order.

LLM(model)                      one rank, in this process
LLM(model, tp=2, sp=2)          plain python: all four ranks are children, and end with this process
LLM(model, sp=2) in each rank   under deepspeed or torchrun: the constructor returns on rank 0 only;
                                on other ranks it follows rank 0, then raises SystemExit(0)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sps2_mega.config import EngineConfig
from sps2_mega.config_mapping import parts_of_engine_config
from sps2_mega.errors import ConfigError, RankFailure, RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.types import SamplingParams

if TYPE_CHECKING:
    from sps2_mega.serving.generation import Generation
    from sps2_mega.serving.remote import RemoteGeneration

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
            ConfigError, CheckpointError: it cannot work; the message says why. The same on every
                rank, and nothing is left behind: the program can go on, with another LLM too.
            RankFailure: a rank was lost. Under a launcher the process ends instead.
            SystemExit: on ranks of a launcher other than rank 0, after rank 0 has closed.
        """
        self.config = engine_config(model, tp=tp, sp=sp, options=options)
        self._driver: Generation | RemoteGeneration
        info = from_environment()
        if info.launcher == "none" and self.config.parallel.world_size > 1:
            from sps2_mega.serving.remote import RemoteGeneration

            self._driver = RemoteGeneration(self.config)
            return
        from sps2_mega.engine.start import run_worker, start_driver
        from sps2_mega.serving.generation import Generation

        if info.rank > 0:
            run_worker(self.config, info)
            sys.exit(0)
        self._driver = Generation(start_driver(self.config, info), self.config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate one output per prompt (text, or a list of token ids), in order.

        Refused prompts have `error` set.

        Raises:
            RequestError: prompts and params do not match, or text was given without a tokenizer.
            RankFailure: a rank was lost; this LLM is closed, and another one can be made.
        """
        listed = as_prompts(prompts)
        return self._call(self._driver.generate, listed, params)

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
        return self._call(self._driver.chat, [list(each) for each in listed], params)

    def close(self) -> None:
        """End all ranks; safe to call twice."""
        self._driver.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        answer: Callable[[Any, Sequence[SamplingParams]], list[RequestOutput]],
        prompts: list[Any],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        each = params_for(len(prompts), params)
        try:
            return answer(prompts, each)
        except (RequestError, RankFailure):
            raise
        except Exception as error:
            # A step that has failed leaves sequences half done: this rank is of no more use.
            self.close()
            raise RankFailure(f"rank 0 failed: {type(error).__name__}: {error}") from error


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
