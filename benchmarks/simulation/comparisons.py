"""Comparisons of the evaluation: name of the result file -> flags of `sps2 simulate`.

A stored result keeps its arguments; these serve until there is one. Together with the stored ones
they cover every model, trace and link that the evaluation names, and Poisson arrivals, shared
prefixes and vLLM-like decode context parallelism once each. `benchmarks/evaluate.py` runs them.
"""

from __future__ import annotations

_OURS = "sps2 sps2-yield sps2-csa sps2-split"

WANTED = {
    "llama-3-8b-h200-servegen": "--model llama-3-8b --hardware h200 --gpus 8 --trace servegen "
    f"--requests 80 --rates 1 4 --tune-on 20 --systems sarathi sarathi-large ring {_OURS}",
    "mistral-7b-h100-conversation": "--model mistral-7b --hardware h100 --gpus 8 --trace "
    "azure-conversation "
    f"--requests 120 --rates 2 8 --tune-on 25 --systems sarathi sarathi-large ulysses {_OURS}",
    "llama-3.1-70b-h100-code": "--model llama-3.1-70b --hardware h100 --gpus 16 --trace "
    "azure-code --length 8 "
    "--requests 60 --rates 0.5 2 --tune-on 15 --systems sarathi sarathi-large sarathi-wide "
    f"vllm-dcp {_OURS}",
    "yi-34b-h200-poisson": "--model yi-34b --hardware h200 --gpus 16 --trace mooncake-synthetic "
    "--poisson "
    "--requests 60 --rates 0.5 2 --tune-on 15 --systems sarathi sarathi-large sarathi-wide "
    f"vllm-dcp {_OURS}",
    "llama-3-8b-h100-prefixes": "--model llama-3-8b --hardware h100 --gpus 16 --trace mooncake "
    "--prefix-caching "
    "--requests 120 --rates 4 16 --tune-on 25 --systems sarathi sarathi-large whole-prompts sps2 "
    "sps2-yield sps2-csa",
    "llama-3.1-70b-b200-long": "--model llama-3.1-70b --hardware b200 --link rdma-100g --gpus 16 "
    "--trace mooncake-synthetic --length 4 --requests 40 --rates 0.25 1 --tune-on 10 --systems "
    "sarathi sarathi-large "
    f"sarathi-wide vllm-dcp ring {_OURS}",
    "llama-3.1-70b-a100-25g": "--model llama-3.1-70b --hardware a100-80g --link ethernet-25g "
    "--gpus 32 "
    "--trace mooncake-synthetic --requests 40 --rates 0.25 1 --tune-on 10 --systems sarathi "
    "sarathi-large sarathi-wide ring "
    f"{_OURS}",
    "llama-3-8b-h100-sustained": "--model llama-3-8b --hardware h100 --gpus 16 --trace "
    "mooncake-synthetic --length 8 "
    "--requests 240 --rates 0.5 --tune-on 20 --systems sarathi sarathi-large sps2 sps2-yield "
    "sps2-csa",
}
