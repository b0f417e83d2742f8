import logging

import pytest

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.planner.attention_choice import choose_transport, prompt_layout
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.config import CSAConfig
from sps2_mega.parallel.launcher import cache_folder
from sps2_mega.parallel.machine import Link, Machine


def planner(*, heads, kv_heads, log_choices=True):
    return PrefillPlanner(
        machine=Machine(
            sp_levels=(4,),
            links=(Link(latency_s=1e-5, bytes_per_s=1e7),),
            flops_per_s=1e11,
        ),
        candidates=("ulysses", "gather", "ring"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=64,
        itemsize=2,
        window=None,
        overlap=False,
        log_choices=log_choices,
    )


def zigzag(tokens, start=0):
    return build_layout(
        [[0, 1, 2, 3, 3, 2, 1, 0]], [tokens], starts=[start], block_size=tokens // 8, sp_size=4
    )


def test_each_kind_of_step_is_logged_once(caplog):
    chosen = planner(heads=32, kv_heads=2)
    with caplog.at_level(logging.INFO):
        names = [chosen.transport(zigzag(n)) for n in (1024, 1600, 1040, 4096)]
        chosen.transport(zigzag(4096, start=4000))
    assert set(names) <= {"gather", "ring"}
    assert len(caplog.records) == 3
    first = caplog.records[0].getMessage()
    assert first.startswith(
        f"prefill of 1024 new tokens behind 0 cached ones: transport {names[0]}"
    )
    assert "ulysses" in first
    assert "96 new tokens behind 4000 cached" in caplog.records[2].getMessage()


def test_other_ranks_choose_alike_and_are_silent(caplog):
    with caplog.at_level(logging.INFO):
        assert planner(heads=8, kv_heads=8, log_choices=False).transport(zigzag(64)) == "ulysses"
    assert not caplog.records


def test_machine_numbers_survive_a_file():
    machine = planner(heads=1, kv_heads=1).machine
    assert Machine.from_json(machine.to_json()) == machine
    alone = Machine(
        sp_levels=(1,),
        links=(Link(latency_s=0.0, bytes_per_s=float("inf")),),
        flops_per_s=1.0,
    )
    assert Machine.from_json(alone.to_json()) == alone
    for text in ("", "[]", "{}", '{"sp_levels": [2], "links": [], "flops_per_s": 1}'):
        with pytest.raises(ValueError):
            Machine.from_json(text)


def test_auto_is_decided_per_step_on_several_ranks(monkeypatch):
    model = None  # looked at with CSA only
    assert choose_transport("auto", CSAConfig(), model, sp=2) == "auto"
    assert choose_transport("auto", CSAConfig(), model) == "ulysses"
    assert choose_transport("ring", CSAConfig(), model, sp=2) == "ring"
    assert prompt_layout("auto", CSAConfig()) == "zigzag"
    assert prompt_layout("ulysses", CSAConfig()) == "contiguous"


def test_the_cache_folder_follows_the_users_session(tmp_path):
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "sps2_mega"
    assert cache_folder({}).parts[-2:] == (".cache", "sps2_mega")
