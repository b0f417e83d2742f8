"""Initial weights: small random numbers, and an induction circuit in the first two layers.

Looking a value up by its name takes two layers that work together: one that tells every position
what stands before it, and one that finds the position with the same things before it. Random
weights with a few megabytes of text do not get there: neither layer lowers the loss before the
other exists. So both start roughly right, and everything is trained from there. This file decides
those starting weights and nothing else.

    hidden     | one | token identity | features of the byte 1, 2, .. 8 before |
               |  0  |   identity     |   before[0]  before[1]   ..             |

    layer 0    head h attends to the position h + 1 before: queries and keys are constant vectors in
               the dimensions that RoPE turns quickly, the queries' turned back by h + 1 positions.
               The head copies a short code of that token into before[h].
    layer 1    queries and keys are random mixtures of these codes in the dimensions that RoPE
               hardly turns, so that they meet at any distance: the key at s describes the bytes
               before s, the query at t the bytes up to t. Where they agree, the token at s is what
               followed last time: its identity is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.train.model import TinyLlama, inverse_frequencies
from sps2_mega.errors import ConfigError

RANDOM_STD = 0.02
_EMBEDDING_STD = 0.05
# Dimension 0's share of an embedding's energy: enough to be found after normalisation, not to drown
# the rest.
_ONE_SHARE = 0.25
_LOCAL_SHARPNESS = 10.0  # logit of the right neighbour minus the next one is about 0.6 of it
_MATCH_SHARPNESS = 2.0
# Of a found token's identity, relative to that of the present token. Both query heads of a pair add
# to it, and the codes that layer 0 added have made the stream sqrt(2) longer, which normalisation
# takes off again.
_COPY_GAIN = 2.5
# Which bytes before it the keys of a KV head describe. Some heads see whole names, some only the
# end.
_REACH = ((1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8), (4, 5, 6, 7, 8), (1, 2, 3, 4, 5))
# This query head expects them one byte further back than a repetition has them: a question (`name
# == `) is one byte longer than the definition (`name = `).
_SHIFTED_HEAD = 5


@dataclass(frozen=True, slots=True)
class HiddenLayout:
    """Meaning of the hidden dimensions at the start."""

    identity: slice
    before: tuple[slice, ...]  # one per query head of layer 0


@torch.no_grad()
def initialise(model: TinyLlama, seed: int) -> None:
    """Set all weights, from `seed` alone.

    Raises:
        ConfigError: the architecture has no room for the circuit.
    """
    config = model.config
    if (
        config.num_layers < 2
        or config.num_kv_heads != len(_REACH)
        or config.num_heads != 2 * len(_REACH)
        or config.hidden_size < 128
        or config.head_dim < 16
    ):
        raise ConfigError(
            "the initial circuit needs 2 layers, 8 query heads, 4 KV heads, 16 dimensions a "
            "head, hidden size"
            f" 128 at least, got {config.num_layers} layers, {config.num_heads} and"
            f" {config.num_kv_heads} heads of {config.head_dim}, hidden size {config.hidden_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, RANDOM_STD, generator=generator)
        else:
            parameter.fill_(1.0)
    # What goes back into the stream starts at zero: noise there would drown the circuit, whose
    # features are as small as embeddings are.
    for layer in model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    layout = hidden_layout(config.hidden_size)
    _embeddings(model, layout, generator)
    code = _neighbour_heads(model, layout, generator)
    _match_heads(model, layout, code, generator)


def hidden_layout(hidden_size: int) -> HiddenLayout:
    """Layout of `hidden_size` dimensions, five eighths of them for the eight neighbours."""
    width = (hidden_size - 1) * 5 // (8 * 8)
    start = hidden_size - 8 * width
    before = tuple(slice(start + h * width, start + (h + 1) * width) for h in range(8))
    return HiddenLayout(identity=slice(1, start), before=before)


def _embeddings(model: TinyLlama, layout: HiddenLayout, generator: torch.Generator) -> None:
    weight = model.embed_tokens.weight
    width = layout.identity.stop - layout.identity.start
    weight.mul_(0.1)
    weight[:, layout.identity] = _EMBEDDING_STD * torch.randn(
        len(weight), width, generator=generator
    )
    weight[:, 0] = _EMBEDDING_STD * math.sqrt(width * _ONE_SHARE / (1 - _ONE_SHARE))


def _neighbour_heads(model: TinyLlama, layout: HiddenLayout, generator: torch.Generator) -> Tensor:
    """Set layer 0 and return the code in which neighbours are described.

    The code is [width of `before`, width of identity].
    """
    config, attention = model.config, model.layers[0].self_attn
    dim, fast = config.head_dim, config.head_dim // 4
    one = math.sqrt(config.hidden_size * _ONE_SHARE)  # normalised value of dimension 0
    size = math.sqrt(_LOCAL_SHARPNESS * math.sqrt(dim)) / one
    frequencies = inverse_frequencies(config)[:fast]
    code = _orthonormal(
        layout.before[0].stop - layout.before[0].start,
        layout.identity.stop - layout.identity.start,
        generator,
    )
    for kv_head in range(config.num_kv_heads):
        rows = attention.k_proj.weight[kv_head * dim : (kv_head + 1) * dim]
        rows[:fast, 0] = size
        values = attention.v_proj.weight[kv_head * dim : (kv_head + 1) * dim]
        values[: len(code), layout.identity] = code
    gain = _stream_scale(model)  # codes get the size that identities have in the stream
    for head, target in enumerate(layout.before):
        rows = attention.q_proj.weight[head * dim : (head + 1) * dim]
        rows[:fast, 0] = size * torch.cos(frequencies * (head + 1))
        rows[dim // 2 : dim // 2 + fast, 0] = -size * torch.sin(frequencies * (head + 1))
        columns = attention.o_proj.weight[:, head * dim : (head + 1) * dim]
        columns[target, : len(code)] += gain * torch.eye(len(code))
    return code


def _match_heads(
    model: TinyLlama, layout: HiddenLayout, code: Tensor, generator: torch.Generator
) -> None:
    """Set layer 1."""
    config, attention = model.config, model.layers[1].self_attn
    dim, half = config.head_dim, config.head_dim // 2
    slow = torch.tensor([*range(half - 7, half), *range(dim - 7, dim)])
    width = layout.identity.stop - layout.identity.start
    share = math.ceil(width / config.num_kv_heads)
    for kv_head, reach in enumerate(_REACH):
        keys = attention.k_proj.weight[kv_head * dim : (kv_head + 1) * dim]
        for back in reach:
            mix = _orthonormal(len(slow), len(code), generator)
            mix = mix * math.sqrt(_MATCH_SHARPNESS)
            keys[slow, layout.before[back - 1]] += mix
            for head in (2 * kv_head, 2 * kv_head + 1):
                queries = attention.q_proj.weight[head * dim : (head + 1) * dim]
                # What stood `back` before the key's token stands one nearer to the one that asks
                # for it.
                nearer = back if head == _SHIFTED_HEAD else back - 1
                if nearer == 0:
                    queries[slow, layout.identity] += mix @ code
                else:
                    queries[slow, layout.before[nearer - 1]] += mix
        first = kv_head * share
        copied = torch.arange(first, min(first + share, width))
        values = attention.v_proj.weight[kv_head * dim : (kv_head + 1) * dim]
        values[torch.arange(len(copied)), layout.identity.start + copied] += 1.0
        gain = _COPY_GAIN / 2 * _stream_scale(model) * math.sqrt(2)
        for head in (2 * kv_head, 2 * kv_head + 1):
            columns = attention.o_proj.weight[:, head * dim : (head + 1) * dim]
            columns[layout.identity.start + copied, torch.arange(len(copied))] += gain


def _stream_scale(model: TinyLlama) -> float:
    """Root mean square of an embedding row, by which normalisation divides."""
    return model.embed_tokens.weight.square().mean().sqrt().item()


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Matrix [rows, columns] with orthonormal rows, or columns if there are fewer."""
    if columns < rows:
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].T.contiguous()
