"""`--load-format dummy`: a config.json is enough to start, on one rank and on several."""

from __future__ import annotations

import families
import pytest
from engine_run import run_engine


@pytest.mark.parametrize(("tp", "sp"), [(1, 1), (2, 1), (1, 2)])
def test_a_config_alone_generates(tmp_path, tp, sp):
    families.save_family("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    options = dict(model=str(tmp_path), dtype="float32", load_format="dummy")
    params = dict(max_tokens=5, temperature=0.0, ignore_eos=True)
    requests = [(prompt, params) for prompt in families.prompts((1, 40))]
    for output in run_engine(options, requests, tp=tp, sp=sp):
        assert len(output.completions[0].token_ids) == 5
