"""The paper's claims beside our ratios: a table of docs/evaluation.md, from stored results alone.

Simulated: every SPS2 system against chunked prefill, at every rate of every stored comparison
(docs/results/simulated-*). Measured: replays of a trace (replay.json) and single prompts on an idle
cluster (cluster.json), both emulated. `report` and `trace_replay.figures` compute the ratios.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.trace_replay.figures import ratios
from sps2_mega.simulator.comparison.report import BASELINE, CLAIMS, OURS, Claim, gains
from sps2_mega.simulator.comparison.setting import Outcome

BEGIN, END = "<!-- claims: made by benchmarks.simulation.results -->", "<!-- end of claims -->"
_WIDE = "sarathi-wide"
_NONE = "not measured yet"
_SINGLE = ("TTFT", "prefill throughput")  # of one prompt alone both are the same ratio

# True of all settings seen so far; a new result that contradicts one asks for another sentence.
_WHY = {
    "TTFT": "All GPUs work on one prompt, and CSA leaves out most of a long one's arithmetic. "
    "Where the baseline's engines "
    "keep up with what arrives and prompts are short there is little to gain.",
    "TBT": "Decode engines of their own never wait for a prefill. Colocated, a prefill goes "
    "first and gaps are few and long; "
    "SP decode pays two exchanges per layer.",
    "response time": "Most of it is output tokens, whose pace is the baseline's strength; an "
    "earlier first token decides only "
    "where outputs are short or the baseline's queue grows.",
    "prefill throughput": "Exact attention is the same arithmetic in both. The gain is CSA's on "
    "long prompts, that of larger "
    "steps, and on slow links that of TP's all-reduces.",
    "decode throughput": "The same cache is read, with more exchanges. Above 1 are larger "
    "batches after whole prefills, or a "
    "baseline whose all-reduces cross slow links.",
}


def table(stored: Sequence[tuple[str, Sequence[Outcome]]], folder: Path) -> str:
    """Markdown table; `folder` has the measured results."""
    replays, cluster = _read(folder / "replay.json"), _read(folder / "cluster.json")
    lines = [
        "| claim of the paper | ours, simulated | ours, measured on the emulated cluster | why |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        cells = [
            f"{claim.name} {claim.ratio:g}x",
            _simulated(claim, stored),
            _measured(claim, replays, cluster),
            _WHY[claim.name],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _simulated(claim: Claim, stored: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    seen = sorted(_gains(claim, stored, BASELINE))
    if not seen:
        return "not simulated"
    (most, where), values = seen[-1], [gain for gain, _ in seen]
    reached = sum(value >= claim.ratio for value in values)
    text = (
        f"up to {most:.2f}x ({where}); middle of {len(values)} {statistics.median(values):.2f}x, "
        f"least {values[0]:.2f}x, "
        f"{reached} reach the claim"
    )
    wide = sorted(_gains(claim, stored, _WIDE))
    if wide:
        most, where = wide[-1]
        text += f". Over one engine across all GPUs up to {most:.2f}x ({where})"
    return text


def _gains(
    claim: Claim, stored: Sequence[tuple[str, Sequence[Outcome]]], baseline: str
) -> Iterator[tuple[float, str]]:
    """Yield (gain, where) of all our systems."""
    for setting, outcomes in stored:
        for rate in sorted({outcome.rate for outcome in outcomes}):
            for ours in OURS:
                gain = gains(outcomes, rate, ours, baseline)[claim.name]
                if gain is not None:
                    yield gain, f"{setting}, rate {rate:g}, {ours}"


def _measured(
    claim: Claim, replays: Mapping[str, Any] | None, cluster: Mapping[str, Any] | None
) -> str:
    parts = []
    if replays is not None:
        for rate, systems in ratios(replays["runs"], BASELINE).items():
            for system, found in systems.items():
                gain = found.get(f"{claim.name} mean")
                if gain is not None:
                    spread = f"{gain['least']:.2f}-{gain['most']:.2f}"
                    parts.append(f"trace at {rate}, {system} {gain['median']:.2f}x ({spread})")
    if cluster is not None and claim.name in _SINGLE:
        parts += _single_prompts(cluster)
    return "; ".join(parts) or _NONE


def _single_prompts(cluster: Mapping[str, Any]) -> Iterator[str]:
    """Ratios of the best exact and sparse SP to chunked prefill over TP.

    For each model at its fastest and at its slowest link.
    """
    for run in cluster["runs"]:
        curves = run["curves"]
        chunked = next((name for name in curves if name.startswith("tp-chunked")), None)
        if chunked is None:
            continue
        rates = list(curves[chunked])
        for rate in dict.fromkeys([rates[0], rates[-1]]):
            base = curves[chunked][rate]["ttft_s"]
            exact, sparse = (
                base
                / min(found[rate]["ttft_s"] for name, found in curves.items() if _is(name, kind))
                for kind in ("exact", "sparse")
            )
            yield (
                f"one prompt of {run['tokens']} tokens, {run['shape']} at {rate}, exact "
                f"{exact:.2f}x, CSA {sparse:.2f}x"
            )


def _is(system: str, kind: str) -> bool:
    if kind == "sparse":
        return system in ("csa", "csa-pipelined")
    return system.split("-")[0] in ("ring", "ulysses")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found
