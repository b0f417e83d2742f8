"""Greedy tokens of the bundled prompts and of the test families at two checkouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.generation.checkout import run_models

_BUNDLED = Path("launch", "prompts", "python.jsonl")
_FAMILY_TOKENS = 16
# Runs in a checkout, since families and prompts are its tests'.
_SAVE_FAMILIES = """
import json, pathlib, sys
from tests.families import FAMILIES, prompts, save_family
for name in FAMILIES:
    save_family(name, pathlib.Path(sys.argv[1], name))
print(json.dumps({"names": list(FAMILIES), "prompts": prompts()}))
"""


def compare(before: Path, after: Path, folder: Path, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Identity of all tokens, and the number of tokens compared, per model and number of ranks."""
    models = {"sps2-tiny, bundled prompts": bundled(after)} | families(after, folder)
    compared = {}
    for sp in ranks:
        jobs = [model | {"sp": sp} for model in models.values()]
        answers = [run_models(checkout, jobs)[1] for checkout in (before, after)]
        for name, old, new in zip(models, *answers, strict=True):
            compared[f"{name}, {sp} rank{'s' * (sp > 1)}"] = {
                "identical": old["tokens"] == new["tokens"],
                "prompts": len(new["tokens"]),
                "tokens": sum(map(len, new["tokens"])),
            }
    return {"identical": all(each["identical"] for each in compared.values()), "models": compared}


def bundled(checkout: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (checkout / _BUNDLED).read_text().splitlines()]
    batch = [
        {
            "prompt": line["prompt"],
            "params": {
                "temperature": 0.0,
                "max_tokens": line["max_tokens"],
                "stop": line.get("stop", ()),
            },
        }
        for line in lines
    ]
    return {"model": "sps2-tiny", "options": {"threads": 1}, "batches": [batch]}


def families(checkout: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Models of tests/families.py, saved under `folder`, with its prompts."""
    made = subprocess.run(
        [sys.executable, "-c", _SAVE_FAMILIES, str(folder)],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=False,
    )
    if made.returncode:
        raise RuntimeError(made.stderr)
    said = json.loads(made.stdout.splitlines()[-1])
    params = {"temperature": 0.0, "max_tokens": _FAMILY_TOKENS, "ignore_eos": True}
    batch = [{"prompt": prompt, "params": params} for prompt in said["prompts"]]
    options = {"threads": 1, "dtype": "float32"}
    return {
        name: {"model": str(folder / name), "options": options, "batches": [batch]}
        for name in said["names"]
    }
