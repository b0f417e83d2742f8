"""Published measurements for comparison: Llama 3 405B on H100 by Meta, arXiv 2411.01783v3.

Tables 5 to 8 and section 4.2: context parallelism over nodes with TP 8 inside, against more TP; one
prompt, one sequence in decode. Two constants are fitted to them and to nothing else:
`gemm_efficiency` of hardware/h100-meta.yaml (to the prefills) and `latency_s` of the link
rdma-400g-meta (to the decode steps between nodes). All other figures have sources. TP ranks are
assumed to hold parts of the vocabulary, so a step has one all-reduce more than two per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sps2_mega.config import ModelConfig, RopeConfig
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.step_cost import StepCost, step_cost
from sps2_mega.simulator.system import System

LLAMA_405B = ModelConfig(
    family="llama",
    num_layers=126,
    hidden_size=16384,
    ffn_hidden_size=53248,
    num_heads=128,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=1_000_000,
    rope=RopeConfig(theta=500000.0),
)
FFN_ITEMSIZE = 1  # its feed-forward layers were in FP8


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published figure: seconds of a prefill of `tokens`, or of a decode step behind as many.

    `known_gap` says why the model is not expected to reach it.
    """

    label: str
    kind: Literal["prefill", "decode"]
    tp: int
    sp: int
    tokens: int
    cached: int = 0
    seconds: float
    fitted_to: str = ""
    known_gap: str = ""
    transports: tuple[str, ...] = ("ring",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A published figure, the simulated seconds and the cost terms that make them up."""

    published: Published
    seconds: float
    terms: Mapping[str, float]

    @property
    def error(self) -> float:
        """Relative to the published figure."""
        return self.seconds / self.published.seconds - 1.0


_K128 = 128_000
# Their prefill of 1280 new tokens takes 0.9-1.0 s on 4 nodes, where arithmetic, reading and traffic
# explain 0.2 s.
_STEP_FLOOR = "a floor of 0.6-1 s per prefill step, which the model does not have"
PUBLISHED = (
    Published(
        label="TP8, 128K",
        kind="prefill",
        tp=8,
        sp=1,
        tokens=_K128,
        seconds=42.010,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP2 x TP8, 128K",
        kind="prefill",
        tp=8,
        sp=2,
        tokens=_K128,
        seconds=21.042,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP4 x TP8, 128K",
        kind="prefill",
        tp=8,
        sp=4,
        tokens=_K128,
        seconds=10.950,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP8 x TP8, 128K",
        kind="prefill",
        tp=8,
        sp=8,
        tokens=_K128,
        seconds=5.85,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP16 x TP8, 128K",
        kind="prefill",
        tp=8,
        sp=16,
        tokens=_K128,
        seconds=3.8,
        known_gap=_STEP_FLOOR,
    ),
    Published(
        label="TP16, 128K",
        kind="prefill",
        tp=16,
        sp=1,
        tokens=_K128,
        seconds=29.917,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="TP32, 128K",
        kind="prefill",
        tp=32,
        sp=1,
        tokens=_K128,
        seconds=19.841,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP16 x TP8, 1M",
        kind="prefill",
        tp=8,
        sp=16,
        tokens=1_000_000,
        seconds=77.0,
        fitted_to="gemm_efficiency",
    ),
    Published(
        label="CP4 x TP8, 12.8K behind 115.2K, keys move",
        kind="prefill",
        tp=8,
        sp=4,
        tokens=_K128,
        cached=115_200,
        known_gap=_STEP_FLOOR,
        seconds=2.081,
    ),
    Published(
        label="CP4 x TP8, 12.8K behind 115.2K, queries move",
        kind="prefill",
        tp=8,
        sp=4,
        tokens=_K128,
        cached=115_200,
        known_gap=_STEP_FLOOR,
        seconds=2.205,
        transports=("pass_q",),
    ),
    Published(label="TP8, 128K", kind="decode", tp=8, sp=1, tokens=_K128, seconds=0.04626),
    Published(
        label="CP2 x TP8, 128K",
        kind="decode",
        tp=8,
        sp=2,
        tokens=_K128,
        seconds=0.06023,
        fitted_to="latency_s",
    ),
    Published(
        label="CP4 x TP8, 128K",
        kind="decode",
        tp=8,
        sp=4,
        tokens=_K128,
        seconds=0.07131,
        fitted_to="latency_s",
    ),
    Published(
        label="TP16, 128K",
        kind="decode",
        tp=16,
        sp=1,
        tokens=_K128,
        seconds=0.03952,
        fitted_to="latency_s",
    ),
    Published(
        label="TP32, 128K",
        kind="decode",
        tp=32,
        sp=1,
        tokens=_K128,
        seconds=0.0473,
        fitted_to="latency_s",
    ),
)


def compare(hardware: Hardware, fitted_to: str = "") -> list[Comparison]:
    """Compare the published figures with the cost model on `hardware` (hardware/h100-meta.yaml).

    With `fitted_to`, only those that this constant is fitted to.
    """
    return [_compare(row, hardware) for row in PUBLISHED if fitted_to in ("", row.fitted_to)]


def _compare(published: Published, hardware: Hardware) -> Comparison:
    system = System(
        name=published.label,
        tp=published.tp,
        sp=published.sp,
        transports=published.transports,
    )
    cost = step_cost(
        system,
        LLAMA_405B,
        hardware,
        tp=published.tp,
        sp=published.sp,
        ffn_itemsize=FFN_ITEMSIZE,
    )
    if published.kind == "prefill":
        prompt = Prompt(start=published.cached, end=published.tokens)
        terms = dict(cost.of_tokens([prompt], num_decodes=0, context=0, num_sampled=1))
    else:
        terms = dict(cost.of_tokens([], num_decodes=1, context=published.tokens, num_sampled=1))
        terms["decode_exchange"] = _ring_decode_s(cost)
    return Comparison(published=published, seconds=sum(terms.values()), terms=terms)


def _ring_decode_s(cost: StepCost) -> float:
    """Seconds of the exchanges of their decode.

    It passes queries round a ring, one exchange per hop, and returns outputs and LSE by two
    all-to-alls; a few kilobytes each, so only latencies count.
    """
    if cost.sp == 1:
        return 0.0
    exchanges = cost.sp - 1 + 2
    return cost.size.num_layers * exchanges * cost.hardware.inter_node.latency_s
