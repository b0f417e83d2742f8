"""Streaming into parameters: slices, casts, padding, progress, and refusal before any read."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from unit.checkpoint.checkpoints import CONFIGS, LLAMA, MemorySource

from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.sharding import local_shapes, num_parameters, shard
from sps2_mega.errors import CheckpointError, ConfigError


def empty(config, tp: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        name: torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
        for name, shape in local_shapes(config, tp).items()
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_parameter_gets_its_slice_in_its_dtype(name: str, tp: int) -> None:
    config = CONFIGS[name]
    source = MemorySource(config)
    for rank in range(tp):
        parameters = empty(config, tp)
        load_weights(parameters, source, config, tp_rank=rank, tp=tp)
        for key, weight in source.weights.items():
            expected = shard(key, weight, config, tp_rank=rank, tp=tp)
            assert torch.equal(parameters[key].detach(), expected.float())


def test_padded_vocabulary_rows_of_a_file_are_cut() -> None:
    source = MemorySource(LLAMA, padding=91)
    source.weights["output_layer.weight"][LLAMA.vocab_size :] = 7  # whatever training left there
    parameters = empty(LLAMA, 2)
    load_weights(parameters, source, LLAMA, tp_rank=0, tp=2)
    output = parameters["output_layer.weight"].detach()
    assert output.shape == (128, 20)
    assert torch.equal(output[:37], source.weights["output_layer.weight"][:37].float())
    assert not output[37:].any()


def test_fewer_vocabulary_rows_are_an_error() -> None:
    larger = replace(LLAMA, vocab_size=38)
    with pytest.raises(CheckpointError, match=r"expected \[38, 20\], found \[37, 20\]"):
        load_weights(empty(larger, 1), MemorySource(LLAMA), larger, tp_rank=0, tp=1)


def test_a_tensor_is_dropped_before_the_next_is_read() -> None:
    source = MemorySource(LLAMA)
    original = source.read
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive), name
        tensor = original(name).clone()
        alive.append(weakref.ref(tensor))
        return tensor

    source.read = read  # type: ignore[method-assign]
    load_weights(empty(LLAMA, 2), source, LLAMA, tp_rank=1, tp=2, on_bytes=lambda *_: None)
    assert len(alive) == len(source.weights)


def test_progress_ends_at_the_size_of_the_model() -> None:
    calls: list[tuple[int, int]] = []
    load_weights(
        empty(LLAMA, 1),
        MemorySource(LLAMA),
        LLAMA,
        tp_rank=0,
        tp=1,
        on_bytes=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (2 * num_parameters(LLAMA),) * 2
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_nothing_is_read_when_anything_does_not_fit() -> None:
    source = MemorySource(LLAMA)
    del source.weights["decoder.final_layernorm.weight"]
    source.weights["stray"] = torch.zeros(3)
    source.read = lambda name: pytest.fail("read")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty(LLAMA, 1), source, LLAMA, tp_rank=0, tp=1)
    assert "memory:decoder.final_layernorm.weight" in str(caught.value)
    assert "stray [3]" in str(caught.value)


def test_parameters_that_do_not_fit_are_listed() -> None:
    parameters = empty(LLAMA, 1)
    del parameters["output_layer.weight"]
    parameters["extra"] = torch.zeros(2)
    parameters["decoder.final_layernorm.weight"] = torch.zeros(21)
    parameters["embedding.word_embeddings.weight"] = torch.empty(128, 20, device="meta")
    with pytest.raises(CheckpointError) as caught:
        load_weights(parameters, MemorySource(LLAMA), LLAMA, tp_rank=0, tp=1)
    message = str(caught.value)
    for part in ("output_layer.weight", "extra", "weights [20], parameter [21]", "meta device"):
        assert part in message


def test_a_long_list_is_shortened() -> None:
    deep = replace(LLAMA, num_layers=40)
    with pytest.raises(CheckpointError, match=r"missing \(\d+\)") as caught:
        load_weights(empty(deep, 1), MemorySource(LLAMA), deep, tp_rank=0, tp=1)
    assert "and 214 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 40


def test_an_impossible_tp_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_heads \(6\) .* tp \(4\)"):
        load_weights({}, MemorySource(LLAMA), LLAMA, tp_rank=0, tp=4)
