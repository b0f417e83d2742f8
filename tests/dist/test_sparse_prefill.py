"""The engine under CSA gives the same tokens on every layout, and exact ones where all is near."""

from __future__ import annotations

import families
import pytest
from engine_run import assert_same, run_engine

from sps2_mega.config import CSAConfig


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-one-kv-head")
    families.save_family("llama-one-kv-head", folder)
    wide = tmp_path_factory.mktemp("qwen3")
    families.save_family("qwen3", wide)
    return {
        "one": dict(model=str(folder), dtype="float32"),
        "four": dict(model=str(wide), dtype="float32"),
    }


REQUESTS = [
    (prompt, dict(max_tokens=12, temperature=0.0, logprobs=2))
    for prompt in families.prompts((1, 200, 33, 500, 64), seed=4)
]


def first_logprobs(outputs):
    return [dict(output.completions[0].logprobs[0].top) for output in outputs]


@pytest.fixture(scope="module")
def dense(models):
    return run_engine(models["four"], REQUESTS)


@pytest.mark.parametrize("heads", ["one", "four"])
def test_the_engine_gives_the_same_tokens_on_every_layout(models, dense, heads):
    csa = CSAConfig(degrees=(1, 4), spans=(48,), halo=16, tail=8, sinks=4)
    options = models[heads] | dict(csa=csa)
    expected = run_engine(options, REQUESTS)
    exact = dense if heads == "four" else run_engine(models[heads], REQUESTS)
    assert first_logprobs(expected) != first_logprobs(exact)  # the pattern is really applied
    levels = dict(sp_levels=(2, 2), transport="gather,pass_q")
    for tp, sp, more in [
        (1, 2, dict(transport="auto")),
        (2, 2, dict(transport="ulysses")),
        (1, 3, dict(transport="ring", pipeline="off")),
        (1, 4, levels),
    ]:
        assert_same(run_engine(options | more, REQUESTS, tp=tp, sp=sp), expected)


def test_exact_attention_may_have_a_transport_per_level(models, dense):
    levels = dict(sp_levels=(2, 2), transport="pass_q,ulysses")
    assert_same(run_engine(models["four"] | levels, REQUESTS, sp=4), dense)


def test_a_tail_as_long_as_the_prompt_is_exact(models, dense):
    csa = CSAConfig(degrees=(1, 4), spans=(48,), tail=500)
    assert_same(run_engine(models["four"] | dict(csa=csa), REQUESTS, sp=2), dense)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(csa=CSAConfig(degrees=(1, 4), spans=(16, 32))), ["1,4", "1 spans", "16,32"]),
        (dict(csa=CSAConfig(degrees=(1, 2, 4))), ["1,2,4", "2 spans"]),
        (dict(csa=CSAConfig(degrees=(1, 0), spans=(16,))), ["1,0"]),
        (dict(transport="gather,ulysses"), ["gather,ulysses", "1 SP levels"]),
        (dict(transport="post"), ["post", "ulysses", "pass_q"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(models, options, words):
    with pytest.raises(AssertionError) as error:
        run_engine(models["four"] | options, REQUESTS)
    for word in words:
        assert word in str(error.value)
