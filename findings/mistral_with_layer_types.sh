#!/usr/bin/env bash
# transformers 5.23.0: a Mistral folder whose config.json has `layer_types` is one model for
# AutoModelForCausalLM and another for MistralForCausalLM.
#
# AutoModel takes such a folder for a Ministral, whose layers follow `layer_types`; the class that
# config.json names under `architectures` ignores them and keeps its sliding window in all layers.
# With all layers "full_attention" and a window of 4 the logits of 12 tokens differ from the fifth on.
#
# Seen:   AutoModelForCausalLM builds MinistralForCausalLM
#         same weights, largest difference of logits: 0 in the first 4 positions, above 0.001 later
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0
"$place/venv/bin/python" -m pip install --quiet transformers==5.23.0
cat >"$place/differ.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers

transformers.logging.set_verbosity_error()
folder = Path(sys.argv[1])
torch.manual_seed(0)
config = transformers.MistralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=4, initializer_range=0.5,
)
transformers.MistralForCausalLM(config).save_pretrained(folder)
path = folder / "config.json"
stated = json.loads(path.read_text()) | {"layer_types": ["full_attention"] * 2}
path.write_text(json.dumps(stated))

auto = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
named = transformers.MistralForCausalLM.from_pretrained(folder).eval()
print(f"AutoModelForCausalLM builds {type(auto).__name__}")
assert type(auto).__name__ == "MinistralForCausalLM"
assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), named.parameters()))
ids = torch.arange(12)[None]
with torch.inference_mode():
    apart = (auto(ids).logits - named(ids).logits).abs().amax(-1)[0]
print("largest difference of logits by position:", [round(x, 3) for x in apart.tolist()])
assert apart[:4].max() < 1e-5 and apart[4:].max() > 1e-3
PY
"$place/venv/bin/python" "$place/differ.py" "$place/model"
