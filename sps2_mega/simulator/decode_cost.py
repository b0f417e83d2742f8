"""Seconds of the exchanges of one decode layer.

Queries travel to all SP ranks and partials return, or all keys and values travel to the ranks that
own the sequences; TP ranks that share the tokens of a KV head exchange too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.parallel.machine import Machine
from sps2_mega.simulator.collectives import all_to_all_s
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.model_size import ModelSize
from sps2_mega.simulator.system import System


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeExchange:
    """Exchanges on one engine of `tp` * `sp` GPUs, whose SP levels and links are in `machine`."""

    system: System
    tp: int
    sp: int
    hardware: Hardware
    size: ModelSize
    machine: Machine

    def seconds(self, num_decodes: int, context: int) -> float:
        """Seconds of one layer for `num_decodes` sequences with `context` tokens together."""
        others = (self.sp - 1) / self.sp
        heads = self.size.num_heads / self.tp
        row = heads * self.size.head_dim * self.size.itemsize
        seconds = 0.0
        if self.system.dcp > 1:
            seconds += 2 * self.hardware.intra_node.latency_s
        if self.sp == 1:
            return seconds
        if self.system.decode_move == "keys":
            kept = context / self.sp * others * self.size.kv_bytes(self.tp)
            return seconds + all_to_all_s(kept, self.machine)
        seconds += all_to_all_s(num_decodes * others * row, self.machine)
        return seconds + all_to_all_s(num_decodes * others * (row + 4 * heads), self.machine)
