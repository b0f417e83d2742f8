"""A long prompt needs its cache, the weights and one layer's activations: nothing quadratic."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROMPT_LEN = 12288

# Runs in a process of its own, whose peak is then the engine's.
SCRIPT = """
import json, re, sys
from sps2_mega.config import EngineConfig
from sps2_mega.engine.start import start_driver
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.types import SamplingParams

def mib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

length = int(sys.argv[1])
for transport in sys.argv[2:]:
    config = EngineConfig(dtype="float32", max_model_len=length + 8, transport=transport)
    engine = start_driver(config, from_environment())
    engine.add_request("warm-up", [1] * 5, SamplingParams(max_tokens=2))
    while engine.has_work():
        engine.step()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is in use
    before = mib("VmRSS")
    long = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.add_request("long", [i % 251 for i in range(length)], long)
    while engine.has_work():
        engine.step()
    m = engine.model_config
    heads = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    print(json.dumps({
        "peak": mib("VmHWM") - before,
        "cache": length * m.num_layers * 2 * m.num_kv_heads * m.head_dim * 4 / 2**20,
        "weights": sum(p.numel() for p in engine.model.parameters()) * 4 / 2**20,
        "activations": length * (m.hidden_size + heads + 3 * m.ffn_hidden_size) * 4 / 2**20,
        "mask": length**2 / 2**20,
    }))
    engine.shutdown()
"""


@pytest.mark.slow
def test_peak_of_a_long_prompt():
    transports = ["ulysses", "gather"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(PROMPT_LEN), *transports],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(transports)
    for transport, mib in zip(transports, found, strict=True):
        bound = 2 * (mib["cache"] + mib["weights"] + mib["activations"])
        assert mib["peak"] < bound, (transport, mib)
        # The bound would catch even a one-byte mask of T x T.
        assert mib["mask"] > 0.4 * bound
