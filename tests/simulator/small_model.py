"""A small model and round hardware, so that expected seconds can be worked out by hand."""

from __future__ import annotations

from sps2_mega.config import ModelConfig
from sps2_mega.parallel.machine import Link
from sps2_mega.simulator.hardware import Hardware

MODEL = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=1000,
    max_position_embeddings=1_000_000,
)
ROUND = Hardware(
    name="round",
    gpu="round",
    peak_flops_per_s=1e14,
    gemm_efficiency=1.0,
    attention_efficiency=0.5,
    memory_bytes=1e9,
    memory_bytes_per_s=1e12,
    memory_efficiency=1.0,
    layer_overhead_s=1e-6,
    gpus_per_node=4,
    intra_node=Link(latency_s=1e-5, bytes_per_s=1e11),
    inter_node=Link(latency_s=1e-4, bytes_per_s=1e10),
)
