"""Measurements for a GPU: their arithmetic; on a CPU, parts that start, fail and end one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import figures
from benchmarks.gpu.attention import _Flex
from benchmarks.gpu.bounds import attention_flops, decode_bytes, linear_flops, spread
from benchmarks.gpu.budget import PARTS, limit_s
from benchmarks.gpu.engine_rank import num_blocks
from benchmarks.gpu.part import Part
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu_model import parser, run_parts
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.checkpoint.resolve import resolve_model


def part(tmp_path: Path, *, deadline: float = float("inf")) -> Part:
    return Part(
        name="p",
        sizes=TINY,
        device=torch.device("cpu"),
        deadline=deadline,
        file=tmp_path / "rows",
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bounds_of_llama_3_8b() -> None:
    model = resolve_model("llama-3-8b", needs_weights=False).config
    # 6.98e9 parameters in the layers, 0.53e9 in the head; 128 KiB of keys and values per token.
    assert linear_flops(model, 1) == pytest.approx(2 * 7.504e9, rel=1e-3)
    assert attention_flops(model, 2) == 3 * 4 * 128 * 32 * 32
    assert decode_bytes(model, [1000, 24], 2) == pytest.approx(
        2 * 7.504e9 + 1024 * 131072, rel=1e-3
    )


def test_spread_lengths_keep_their_ends() -> None:
    assert spread(1, 7, 90) == [7]
    assert spread(3, 10, 1000) == [10, 100, 1000]


def test_blocks_of_running_sequences_have_room_for_their_new_tokens() -> None:
    assert num_blocks([1, 16, 17], 3, 16) == 1 + 2 + 2


def test_limits_share_what_is_left() -> None:
    names = list(PARTS)
    left = sum(PARTS.values())
    for index, name in enumerate(names):
        limit = limit_s(name, names[index + 1 :], left)
        assert limit == pytest.approx(PARTS[name])
        left -= limit
    assert limit_s("decode", [], 1e6) == 2 * PARTS["decode"]
    assert limit_s("decode", ["prefill"], 1.9) < 1.9


def test_the_mask_for_flex_attention_is_the_pattern(tmp_path: Path) -> None:
    pattern = CSAPattern(degrees=(1, 4), spans=(10,), sinks=2, halo=3, tail=5, sample_queries=False)
    q, k = torch.zeros(47, 8, 4), torch.zeros(47, 4, 4)
    visible = _Flex(part(tmp_path), q, k, k, 1.0, pattern)._visible(2)
    i, j = torch.meshgrid(torch.arange(47), torch.arange(47), indexing="ij")
    for head in range(8):
        seen = visible(torch.tensor(0), torch.tensor(head), i, j)
        expected = [
            [pattern.sees(a, b, kv_head=head // 2, layer=0, prompt_len=47) for b in range(47)]
            for a in range(47)
        ]
        assert torch.equal(seen, torch.tensor(expected))


def test_a_case_that_fails_or_has_no_time_leaves_the_others_alone(tmp_path: Path) -> None:
    def fails() -> dict:
        raise RuntimeError("no memory\nmore")

    running = part(tmp_path)
    assert running.case({"case": "a"}, fails) is None
    assert running.case({"case": "b"}, lambda: {"seconds": 1.0}) == {"seconds": 1.0}
    assert part(tmp_path, deadline=0.0).case({"case": "c"}, fails, seconds=5.0) is None
    first, second, third = rows(tmp_path / "rows")
    assert first == {"case": "a", "error": "RuntimeError: no memory"}
    assert second == {"case": "b", "seconds": 1.0}
    assert third["case"] == "c" and "it may take 5" in third["skipped"]


def test_lines_compare_with_transformers_on_the_same_lengths() -> None:
    found = figures.lines(
        [
            {"case": "product", "seconds": 1.0, "flops_per_s": 8e14},
            {
                "case": "prefill",
                "tokens": 8,
                "degrees": [1],
                "tokens_per_s": 30.0,
                "flops_per_s": 6e14,
            },
            {"case": "prefill transformers", "tokens": 8, "tokens_per_s": 20.0},
            {"case": "prefill", "tokens": 9, "degrees": [1], "tokens_per_s": 30.0},
            {"case": "decode", "batch": 1, "context": 5, "tokens": 5, "error": "RuntimeError: no"},
        ]
    )
    assert "0.75 of the matrix rate" in found[1] and "1.50x transformers" in found[1]
    assert "transformers" not in found[3]
    assert found[4].endswith("error: RuntimeError: no")


def test_parts_run_in_processes_of_their_own(tmp_path: Path) -> None:
    options = ["--tiny", "--budget-s", "120", "--out", str(tmp_path)]
    assert run_parts(["ceilings"], parser().parse_args(options)) == 0
    result = json.loads((tmp_path / "gpu-model.json").read_text())
    assert result["parts"]["ceilings"]["status"] == "ended"
    assert any("flops_per_s" in row for row in result["rows"])
    assert (tmp_path / "gpu-model.png").is_file()
