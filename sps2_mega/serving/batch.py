"""Batch job over a file of requests: cheap checks, model start, run, one record per answer.

    prepare (no model)  ->  engine start  ->  run  ->  exit code
    input, output, resume                     tokenise -> drive -> record

`batch_input` parses lines, `batch_records` forms records, and `batch_output` owns the file on disk.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.architecture import model_config_to_mapping
from sps2_mega.checkpoint.given_config import given_config
from sps2_mega.checkpoint.resolve import suggested_csa
from sps2_mega.config import EngineConfig
from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.serving.batch_input import BadLine, GoodLine, Scan, read_lines, scan
from sps2_mega.serving.batch_output import BatchOutput, OutputMode
from sps2_mega.serving.batch_records import answer_record, error_record
from sps2_mega.serving.drive import Submission, drive, failed
from sps2_mega.serving.progress import Progress, RunTotals
from sps2_mega.serving.prompts import prompt_tokens
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.worker.sampling.seeds import derive_seed_from_text

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_SOME_FAILED, EXIT_COULD_NOT_RUN = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """Input, output and options of a batch job.

    `sampling` holds SamplingParams fields for lines that omit them. The first `show`
    answers to finish are also written to stdout.
    """

    input: Path
    output: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)
    mode: OutputMode = OutputMode.NEW
    retry_errors: bool = False
    limit: int | None = None
    show: int = 0


class BatchJob:
    """A checked input and an open output; `run` writes one record for each unanswered line."""

    def __init__(
        self, options: BatchOptions, config: EngineConfig, found: Scan, output: BatchOutput
    ) -> None:
        self._options, self._config, self._scan, self._output = options, config, found, output
        # Only a resumed run has to look for the lines that are left.
        resumed = output.num_answered or output.num_failed
        self.num_left = sum(1 for _ in self._lines()) if resumed else found.num_lines
        self.totals = RunTotals()
        self._shown = 0

    @classmethod
    def prepare(cls, options: BatchOptions, config: EngineConfig) -> BatchJob:
        """Check everything that needs no model.

        Raises:
            ConfigError: the input cannot be read, the output cannot be written, or they do not
                match.
        """
        if options.limit is not None and options.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {options.limit}")
        if not options.input.is_file():
            raise ConfigError(f"input {options.input} is not a file")
        if os.path.realpath(options.input) == os.path.realpath(options.output):
            raise ConfigError(f"input and output are the same file: {options.input}")
        found = scan(options.input, options.sampling, limit=options.limit)
        for warning, count in found.warnings.items():
            logger.warning("%s: %s (%d lines)", options.input, warning, count)
        output = BatchOutput.open(
            options.output,
            mode=options.mode,
            retry_errors=options.retry_errors,
            fingerprint=fingerprint(config, options.sampling, found.sha256),
        )
        job = cls(options, config, found, output)
        logger.info(
            "%s: %d requests, %d malformed, %d answered before, %d to do",
            options.input,
            found.num_lines,
            len(found.bad),
            output.num_answered,
            job.num_left,
        )
        return job

    def run(self, engine: Any) -> int:
        """Answer the remaining lines with a started engine; return the exit code."""
        self.totals = RunTotals()
        progress = Progress(self.num_left, self.totals)
        lines: dict[str, GoodLine | BadLine] = {}
        outputs = drive(
            engine,
            self._submissions(engine.tokenizer, lines),
            max_in_flight=4 * self._config.scheduler.max_running,
            on_step=lambda seconds: progress.step(engine.stats(), seconds),
        )
        model = Path(_place(self._config.model)).name
        try:
            for output in outputs:
                line = lines.pop(output.request_id)
                if isinstance(line, BadLine) or output.error is not None:
                    record = error_record(line, output.error or "no answer")
                else:
                    record = answer_record(line, output, model=model, tokenizer=engine.tokenizer)
                self._output.write(record)
                self.totals.add(output)
                self._show(progress, line, output)
        finally:
            progress.close()
            self._output.close()
        return self.exit_code

    @property
    def exit_code(self) -> int:
        """Exit code; errors of earlier runs that are still in the file count as well."""
        some_failed = self.totals.num_failed + self._output.num_failed
        return EXIT_SOME_FAILED if some_failed else EXIT_OK

    def close(self) -> None:
        self._output.close()

    def _lines(self) -> Iterator[GoodLine | BadLine]:
        options = self._options
        for line in read_lines(options.input, options.sampling, self._scan, limit=options.limit):
            if not self._output.has(line):
                yield line

    def _submissions(
        self, tokenizer: Tokenizer | None, lines: dict[str, GoodLine | BadLine]
    ) -> Iterator[Submission | RequestOutput]:
        """Requests with tokens; `lines` maps each request id to its line until it is answered."""
        for line in self._lines():
            request_id = str(line.number)
            lines[request_id] = line
            if isinstance(line, BadLine):
                yield failed(request_id, line.error)
                continue
            try:
                tokens = prompt_tokens(line.request, tokenizer)
            except RequestError as error:
                yield failed(request_id, str(error))
                continue
            params = line.request.params
            if params.seed is None:
                params = params.replace(
                    seed=derive_seed_from_text(self._config.seed, str(line.line_id))
                )
            yield Submission(request_id=request_id, prompt_token_ids=tokens, params=params)

    def _show(self, progress: Progress, line: GoodLine | BadLine, output: RequestOutput) -> None:
        if self._shown >= self._options.show:
            return
        self._shown += 1
        texts = [completion.text for completion in output.completions] or [f"error: {output.error}"]
        progress.message("\n".join(f"[{line.line_id}] {text}" for text in texts))


def fingerprint(
    config: EngineConfig, sampling: Mapping[str, Any], input_sha256: str
) -> dict[str, Any]:
    """Settings that two runs must share to give the same answers.

    The number of ranks is included only if the spans of sparse attention follow the ranks.
    """
    asked, given = config.csa.over(suggested_csa(config.model)), config.config
    csa = None
    if not asked.exact:
        csa = dataclasses.asdict(asked) | {"degrees": list(asked.level_degrees)}
        spans = asked.spans
        csa["spans"] = f"{config.parallel.sp} ranks" if spans is None else list(spans)
    return {
        "csa": csa,
        "decode_attention": config.decode_attention,
        "input_sha256": input_sha256,
        "model": _place(config.model),
        **({} if given is None else {"config": model_config_to_mapping(given_config(given))}),
        "tokenizer": None if config.tokenizer is None else _place(config.tokenizer),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "seed": config.seed,
        "sampling": {name: sampling[name] for name in sorted(sampling)},
    }


def _place(model: str) -> str:
    return os.path.realpath(model) if os.path.isdir(model) else model
