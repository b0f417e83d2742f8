"""How prefill brings queries and keys together: one file per transport, all giving the one-rank
result.

    Gather    keys and values go to every rank at once, queries stay
    Ring      keys and values go round, one rank further per step (pass-KV, arXiv 2310.01889)
    PassQ     queries go to every rank at once, keys and values stay
    Ulysses   heads are dealt to ranks by all-to-all, each rank sees every token (arXiv 2309.14509)

A transport is made per step from the layout; indices are computed then, not in each layer.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sps2_mega.attention.layout.token_layout import PrefillLayout
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.softmax_params import SoftmaxParams
from sps2_mega.attention.transports.gather import Gather
from sps2_mega.attention.transports.pass_q import PassQ
from sps2_mega.attention.transports.ring import Ring
from sps2_mega.attention.transports.ulysses import Ulysses
from sps2_mega.parallel.groups import Group


class Transport(Protocol):
    def attend(
        self, layer: int, q_TNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, rule: SoftmaxParams
    ) -> Tensor:
        """Causal attention of this rank's queries over the keys of all ranks, both in their local order
        -> out [T, N, H]. C = T where nothing was cached before."""
        ...


def make_transport(
    name: str,
    layout: PrefillLayout,
    group: Group,
    device: torch.device,
    pipeline: Pipeline | None = None,
) -> Transport:
    """The transport called `name` in the configuration, for one step. Without `pipeline` nothing
    overlaps."""
    if name == "gather":
        return Gather(layout, group, device, pipeline)
    if name == "ring":
        return Ring(layout, group, device, pipeline)
    if name == "pass_q":
        return PassQ(layout, group, device, pipeline)
    assert name == "ulysses", f"unknown transport {name!r}"
    return Ulysses(layout, group, device, pipeline)
