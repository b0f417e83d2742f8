"""All settings on one workload: the result that is written as JSON, in plain values.

Decides the order of measurement, what is measured once for several settings, and how seeds are
pooled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from benchmarks.eval.answers import Verdict, answer_probes
from benchmarks.eval.costs import FAR_LENGTH, cost
from benchmarks.eval.measure import Job, TextScores, score_texts, text_measures
from benchmarks.eval.settings import Extents, named_setting
from benchmarks.eval.tasks import Probe
from benchmarks.eval.workload import Amounts, Workload
from sps2_mega.config import CSAConfig
from sps2_mega.text.tokenizer import Tokenizer


def measure_settings(
    names: list[str],
    job: Job,
    tokenizer: Tokenizer,
    work: Workload,
    amounts: Amounts,
    extents: Extents,
    *,
    kl_stride: int,
    on_prompt: Callable[[str], None],
    on_setting: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Configuration, cost, text measures and tasks, by setting and length.

    Args:
        names: settings, of which the first is dense.
        job: a started rank; all ranks call together.
        tokenizer: the model's own.
        work: windows and probes by length.
        amounts: numbers of windows and probes.
        extents: spans and further tokens that settings share.
        kl_stride: tokens between the positions at which the divergence from dense is taken.
        on_prompt: called with the setting's name after each prompt.
        on_setting: called with all results after each setting.
    """
    measured: dict[str, Any] = {}
    dense_scores: dict[int, TextScores] = {}
    dense_verdicts: dict[int, list[Verdict]] = {}
    known_texts: dict[tuple[int, CSAConfig], dict[str, Any]] = {}
    for name in names:
        measured[name] = {}
        for length in amounts.lengths:
            setting = named_setting(name, length, extents)

            def done(name: str = name) -> None:
                on_prompt(name)

            # Settings that differ only in decode score texts alike.
            text = known_texts.get((length, setting.csa))
            if text is None:
                scores = score_texts(
                    job,
                    setting.csa,
                    work.windows[length],
                    tokenizer,
                    stride=kl_stride,
                    on_done=done,
                )
                dense_scores.setdefault(length, scores)
                text = text_measures(scores, dense_scores[length], extents.tail)
                known_texts[length, setting.csa] = text
            else:
                for _ in work.windows[length]:
                    done()
            verdicts = answer_probes(job, setting, work.probes[length], tokenizer, on_done=done)
            dense_verdicts.setdefault(length, verdicts)
            measured[name][str(length)] = {
                "csa": dataclasses.asdict(setting.csa),
                "sparse_decode": setting.sparse_decode,
                "cost": costs(name, length, job, extents),
                "text": text,
                "tasks": task_measures(
                    work.probes[length], verdicts, dense_verdicts[length], amounts
                ),
            }
        on_setting(measured)
    return measured


def costs(name: str, length: int, job: Job, extents: Extents) -> dict[str, Any]:
    """Cost at `length`, and at FAR_LENGTH if the setting's spans are shares of the length."""
    model = job.started.resolved.config
    found = {}
    for key, at in (("here", length), ("far", FAR_LENGTH)):
        span = extents.spans[0]
        cell = span if isinstance(span, int) else max(1, int(span * at))
        found[key] = dataclasses.asdict(
            cost(named_setting(name, at, extents), at, model, cell=cell)
        )
    return found["here"] | {f"at_{FAR_LENGTH}": found["far"]}


def task_measures(
    probes: list[Probe], verdicts: list[Verdict], dense: list[Verdict], amounts: Amounts
) -> dict[str, Any]:
    """Exact answers per task, by depth and by seed, and their change from dense on the same probes.

    Both have standard errors. Also the share of right characters, and of a second turn's prompt
    that was cached.
    """
    found = {}
    for task in amounts.tasks:
        mine = [i for i, probe in enumerate(probes) if probe.task == task]
        exact = [float(verdicts[i].exact) for i in mine]
        scored = [(probes[i], value) for i, value in zip(mine, exact, strict=True)]
        changes = [float(verdicts[i].exact) - float(dense[i].exact) for i in mine]
        found[task] = {
            "exact": mean(exact),
            "standard_error": share_error(exact),
            "change": mean(changes),
            "change_standard_error": mean_error(changes),
            "prefix": mean([verdicts[i].prefix for i in mine]),
            "cached": mean([verdicts[i].cached for i in mine]),
            "depths": {
                str(depth): mean([value for probe, value in scored if probe.depth == depth])
                for depth in amounts.depths
            },
            "seeds": {
                str(seed): mean([value for probe, value in scored if probe.seed == seed])
                for seed in amounts.seeds
            },
            "num_probes": len(mine),
        }
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def mean_error(values: list[float]) -> float | None:
    """Standard error of a mean; None for a single value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def share_error(values: list[float]) -> float:
    """Standard error of a share of zeros and ones, with one of each added.

    So it stays above 0 where all are alike.
    """
    count = len(values) + 2
    share = (sum(values) + 1) / count
    return math.sqrt(share * (1 - share) / count)
