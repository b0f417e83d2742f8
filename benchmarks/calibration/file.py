"""Hardware file of the simulator from measured terms, with date and method beside every figure.

Decides the names of links and the stand-ins for what could not be measured; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from benchmarks.calibration.links import MeasuredLink
from benchmarks.calibration.terms import Terms

_HEAD = (
    "# Measured figures of one machine for sps2_mega's simulator; see docs/evaluation.md. "
    "FLOPs count a multiply and an add as two.\n"
)


def hardware_text(
    terms: Terms,
    *,
    model: str,
    command: str,
    date: str,
    between: Mapping[str, MeasuredLink] | None = None,
) -> str:
    """YAML for `load_hardware`.

    `between` are links between nodes by name, the first of which is the file's own; None means the
    outermost SP level's.
    """
    made = f"measured, {command}, {date}"
    ranks = f"{terms.ranks} rank{'s' if terms.ranks > 1 else ''} at once"
    inside, outside = _levels(terms)
    how_link = f"exchanges of {ranks}; {made}" if terms.links else f"one rank, no link; {made}"
    links = {"inside": _link(inside, how_link)}
    outer = dict(between) if between else {"outside": outside}
    links |= {name: _link(link, how_link) for name, link in outer.items()}
    content: dict[str, Any] = {
        "gpu": terms.device,
        "peak_flops_per_s": terms.peak_flops_per_s,
        "gemm_efficiency": terms.linear_flops_per_s / terms.peak_flops_per_s,
        "attention_efficiency": terms.attention_flops_per_s / terms.peak_flops_per_s,
        "memory_bytes": terms.memory_bytes,
        "memory_bytes_per_s": terms.read_bytes_per_s,
        "memory_efficiency": 1.0,
        "layer_overhead_s": terms.layer_overhead_s,
        "step_overhead_s": terms.step_overhead_s,
        "kv_bytes_per_s": terms.kv_bytes_per_s,
        "call_s": terms.call_s,
        "merge_s": terms.merge_s,
        "copy_s": terms.copy_s,
        "gpus_per_node": terms.ranks_per_node,
        "intra_node": "inside",
        "inter_node": next(iter(outer)),
    }
    how = {
        "peak_flops_per_s": f"a square product, {ranks}",
        "gemm_efficiency": f"a layer of {model} without attention, {terms.tokens} tokens, {ranks}",
        "attention_efficiency": f"causal, {terms.tokens} tokens, heads of {model}, {ranks}",
        "memory_bytes": "what the system says it has, per rank",
        "memory_bytes_per_s": f"weights of a layer of {model} for one token, or of a larger "
        f"matrix where a cache may hold them, {ranks}",
        "memory_efficiency": "the rate above is what was reached",
        "layer_overhead_s": "a layer of a decode step, without reading its weights and without "
        "exchanges",
        "step_overhead_s": "a decode step without its layers",
        "kv_bytes_per_s": f"decode attention over {terms.tokens} tokens, heads of {model}, {ranks}",
        "call_s": "attention of one query",
        "merge_s": "merging two partials, per number",
        "copy_s": "gathering rows, per number",
        "gpus_per_node": "as the job was started",
    }
    content = {name: _short(value) for name, value in content.items()}
    content["links"] = links
    content["sources"] = {name: f"{text}; {made}" for name, text in how.items()}
    return _HEAD + yaml.safe_dump(content, sort_keys=False, width=10_000)


def _levels(terms: Terms) -> tuple[MeasuredLink, MeasuredLink]:
    """Links inside a node and between nodes.

    If one of them was not measured, the other stands for it; a single rank gets its memory's rate.
    """
    if not terms.links:
        alone = MeasuredLink(latency_s=terms.call_s, bytes_per_s=terms.read_bytes_per_s)
        return alone, alone
    return terms.links[0], terms.links[-1]


def _link(link: MeasuredLink, how: str) -> dict[str, Any]:
    return {
        "nominal_bytes_per_s": _short(link.bytes_per_s),
        "efficiency": 1.0,
        "latency_s": _short(link.latency_s),
        "exchange_factor": _short(link.exchange_factor),
        "stream_factor": _short(link.stream_factor),
        "reduce_factor": _short(link.reduce_factor),
        "reduce_latency_s": _short(link.reduce_latency_s),
        "sources": {
            "nominal_bytes_per_s": how,
            "efficiency": "the rate above is what was reached",
            "latency_s": how,
            "exchange_factor": f"an all-to-all over what that rate says; {how}",
            "stream_factor": f"several all-to-alls under way, likewise; {how}",
            "reduce_factor": f"an all-reduce over what that rate says; {how}",
            "reduce_latency_s": f"a small all-reduce; {how}",
        },
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
