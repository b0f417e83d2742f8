"""Calibration on emulated nodes: all ranks, then TP over them, then one rank alone, per link rate.

Figures of one result file are measured in turn: the machine's speed changes from one minute to the
next, and what two ranks get of it can only be compared with what one rank gets at the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration.links import MeasuredLink
from benchmarks.calibration.rates import joined, with_reduce_latency
from benchmarks.calibration.terms import Terms, terms_of
from benchmarks.emulated.jobs import rank_environment
from benchmarks.emulated.nodes import ClusterError, Link, Node, emulated_cluster, rate_name
from benchmarks.machine import ROOT, stolen_since
from sps2_mega.config import ModelConfig

AS_JSON = "SPS2_CALIBRATE_JSON"  # tells a rank to write one of these instead of a hardware file
TERMS, TP_STEP = "terms", "tp-step"
_PORT = 29700
_RANK_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OnNodes:
    """Results of all rates so far.

    `between` are the links by their names in the file; `alone` is one rank's, if it was requested.
    """

    terms: Terms
    between: dict[str, MeasuredLink]
    alone: Terms | None


def on_emulated_nodes(
    nodes: int,
    rates: Sequence[float | None],
    command: Sequence[str],
    probe: ModelConfig,
    *,
    with_one_rank: bool,
) -> Iterator[OnNodes]:
    """Yield the results after each rate.

    `command` starts a rank, which gets `--output FILE` in addition; `probe` is the model of its
    decode steps.

    Raises:
        ClusterError: this machine cannot emulate nodes, or a rank failed.
    """
    if nodes < 2:
        raise ClusterError(f"--nodes must be at least 2, got {nodes}")
    together: list[Terms] = []
    alone: list[Terms] = []
    names: list[str] = []
    with emulated_cluster(nodes) as cluster, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.yaml"
        jobs = _Jobs(command, output)
        for rate in rates:
            cluster.set_link(Link(bits_per_s=rate))
            stolen = stolen_since()
            terms = terms_of(jobs.run(TERMS, cluster.nodes))
            if probe.num_kv_heads % nodes == 0:
                terms = with_reduce_latency(terms, jobs.run(TP_STEP, cluster.nodes), probe)
            together.append(terms)
            if with_one_rank:
                alone.append(terms_of(jobs.run(TERMS, cluster.nodes[:1])))
            names.append(f"between-{rate_name(rate)}")
            print(
                f"calibrate: {rate_name(rate)} is measured; other machines had {stolen():.1%} of "
                "the cores",
                file=sys.stderr,
            )
            middle, links = joined(together)
            yield OnNodes(
                terms=middle,
                between=dict(zip(names, links, strict=True)),
                alone=joined(alone)[0] if alone else None,
            )


class _Jobs:
    """Runner of one command's ranks, one job after the other."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        self._command = [*command, "--output", str(output)]
        self._output = output
        self._started = 0

    def run(self, what: str, nodes: Sequence[Node]) -> Any:
        """Run the ranks and return what rank 0 wrote.

        Raises:
            ClusterError: a rank failed, or did not end.
        """
        self._started += 1
        ranks = [
            subprocess.Popen(
                [*node.prefix, *self._command],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                env=os.environ
                | rank_environment(rank, nodes, _PORT + self._started)
                | {AS_JSON: what, "PYTHONPATH": str(ROOT)},
            )
            for rank, node in enumerate(nodes)
        ]
        try:
            codes = [rank.wait(_RANK_S) for rank in ranks]
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{what}: ranks did not end within {_RANK_S:g} s") from None
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise ClusterError(f"{what}: ranks ended with exit codes {codes}")
        return json.loads(self._output.read_text())
