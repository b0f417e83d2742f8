"""Seconds of work inside one GPU: matrix products, attention and memory traffic.

A product takes what its arithmetic takes, or what reading its weights takes, whichever is longer
(roofline); attention likewise with its keys and values. Ranks, links and overlap are decided
elsewhere.
"""

from __future__ import annotations

from sps2_mega.simulator.hardware import Hardware


def gemm_s(tokens: float, params: float, weight_bytes: float, hardware: Hardware) -> float:
    """Seconds of `tokens` rows times a matrix of `params` numbers, which takes `weight_bytes`."""
    if not tokens:
        return 0.0
    return max(
        2.0 * tokens * params / hardware.gemm_flops_per_s, weight_bytes / hardware.read_bytes_per_s
    )


def attention_s(pairs: float, head_dim: int, kv_bytes: float, hardware: Hardware) -> float:
    """Seconds of attention over `pairs` (query, key, query head) triples.

    `kv_bytes` of keys and values are read at least once.
    """
    arithmetic = 4.0 * head_dim * pairs / hardware.attention_flops_per_s
    return max(arithmetic, kv_bytes / hardware.read_bytes_per_s)


def kv_read_s(num_bytes: float, hardware: Hardware) -> float:
    """Seconds of decode attention over `num_bytes` of cached keys and values."""
    return num_bytes / (hardware.kv_bytes_per_s or hardware.read_bytes_per_s)


def memory_s(num_bytes: float, hardware: Hardware) -> float:
    """Seconds of plain reading or writing."""
    return num_bytes / hardware.read_bytes_per_s
