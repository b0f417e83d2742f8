"""Megatron's GPTModel with our core attention, driven one step at a time.

The model is built on the meta device and then gets real memory, so no rank ever holds
an unsharded parameter. Embedding, layers and output head are called one after the
other, so that logits exist only for sampled rows, rotary angles follow each token's own
position, and other steps may run between two layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sps2_mega.checkpoint.sharding import padded_vocab_size
from sps2_mega.comm.collectives import all_gather_last_dim
from sps2_mega.config import ModelConfig
from sps2_mega.kernels.backend import Backend, choose
from sps2_mega.mcore._compat import run_final_norm, run_layers, step_carrier_class
from sps2_mega.mcore.build import build_gpt_model
from sps2_mega.mcore.core_attention import LayerAttention
from sps2_mega.mcore.feed_forward import StepRows
from sps2_mega.mcore.output_layer import OutputLayer
from sps2_mega.mcore.packed_weights import can_pack, pack_weights
from sps2_mega.mcore.rope import (
    angles,
    inverse_frequencies,
    rotates_whole_heads,
    rotation,
)
from sps2_mega.parallel.groups import ParallelGroups


@dataclass(slots=True)
class ForwardPass:
    """Local tokens on their way through the model: hidden states before layer `next_layer`.

    `sliced_rows` are the rows of each SP rank where feed-forward layers are computed in slices.
    """

    hidden_T1C: Tensor
    rope: Tensor | None
    carrier: Any
    sliced_rows: Sequence[int] | None = None
    next_layer: int = 0


class GPT(nn.Module):
    """One TP rank's model: local tokens in, logits of chosen rows out."""

    def __init__(
        self,
        model: ModelConfig,
        groups: ParallelGroups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        fused_rotary: bool | None = None,
    ) -> None:
        """Build the model with uninitialised weights.

        With `fused_rotary` the step's attention rotates q and k as it writes the
        cache; otherwise Megatron's layers do, in some twenty launches each.
        None: fused wherever our own kernels run. They rotate whole heads, as halves, in all
        layers; Megatron's layers rotate where a model does not.
        """
        super().__init__()
        self._config, self._tp, self._dtype = model, groups.tp, dtype
        if fused_rotary is None:
            fused_rotary = choose(device, None) is Backend.TRITON
        self._fused_rotary = fused_rotary and rotates_whole_heads(model)
        self.gpt = build_gpt_model(
            model, tp=groups.tp.size, sp=groups.sp.size, dtype=dtype, device_type=device.type
        ).to_empty(device=device)
        self._inv_freq = (
            None
            if model.rope is None
            else inverse_frequencies(model.rope, model.head_dim, model.max_position_embeddings).to(
                device
            )
        )
        self._carrier = step_carrier_class()
        self._step_rows = StepRows()
        for layer in self.gpt.decoder.layers:
            layer.mlp.use(groups, self._step_rows)
        tied = model.tie_embeddings
        shared = self.gpt.shared_embedding_or_output_weight() if tied else None
        self._output = OutputLayer(self.gpt.output_layer, shared, groups.sp)

    def weights(self) -> dict[str, Tensor]:
        """Parameters by canonical name, for `checkpoint.load` to fill."""
        return dict(self.gpt.named_parameters())

    def pack(self) -> None:
        """Bring loaded weights into the form that this device multiplies fastest.

        Those of linear layers can then not be read any more: `weights` has their shapes only.
        """
        if can_pack(self._dtype, next(self.gpt.parameters()).device):
            for layer in self.gpt.decoder.layers:
                layer.mlp.pack()
            self._output.pack()
            pack_weights(self.gpt.decoder)

    @torch.inference_mode()
    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, rows_R: Tensor, attention: LayerAttention
    ) -> Tensor:
        """Logits [R, vocab] float32 of local rows `rows_R`; every TP rank gets all columns.

        T and R may be 0: the rank still takes part in every collective.
        """
        hidden = self.hidden(tokens_T, positions_T, attention)
        return self.logits(hidden.index_select(0, rows_R))

    @torch.inference_mode()
    def hidden(self, tokens_T: Tensor, positions_T: Tensor, attention: LayerAttention) -> Tensor:
        """Output of the last norm for each local token, [T, 1, hidden_size].

        See `begin` for T = 0.
        """
        run = self.begin(tokens_T, positions_T, attention)
        self.advance(run, self.num_layers)
        return self.finish(run)

    @property
    def num_layers(self) -> int:
        return self._config.num_layers

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @torch.inference_mode()
    def begin(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attention: LayerAttention,
        sliced_rows: Sequence[int] | None = None,
    ) -> ForwardPass:
        """Embed this rank's tokens; no layer runs yet.

        With `sliced_rows`, the tokens of each SP rank, feed-forward layers of the pass are computed
        in slices; without, each rank computes those of its own tokens.

        Megatron's layers cannot take 0 tokens, so an empty rank sends a placeholder through them,
        which stops at the core attention; `finish` returns its one row.
        """
        num_tokens = tokens_T.shape[0]
        if num_tokens == 0:
            tokens_T = positions_T = tokens_T.new_zeros(1)
        carrier = self._carrier(attention=attention, num_tokens=num_tokens)
        rope = None
        if self._inv_freq is not None and self._fused_rotary:
            carrier.rotation = rotation(positions_T, self._inv_freq, self._dtype)
        elif self._inv_freq is not None:
            assert self._config.rope is not None
            rope = angles(positions_T, self._inv_freq, interleaved=self._config.rope.interleaved)
        hidden = self.gpt.embedding(input_ids=tokens_T[None], position_ids=positions_T[None])
        return ForwardPass(hidden, rope, carrier, sliced_rows)

    @torch.inference_mode()
    def advance(self, run: ForwardPass, end: int) -> None:
        """Run the layers before number `end` that have not run yet."""
        assert run.next_layer <= end <= self.num_layers, (
            f"layers [{run.next_layer}, {end}) of {self.num_layers}"
        )
        self._step_rows.by_rank = run.sliced_rows
        run.hidden_T1C = run_layers(
            self.gpt.decoder,
            range(run.next_layer, end),
            run.hidden_T1C,
            rotary_pos_emb=run.rope,
            packed_seq_params=run.carrier,
        )
        run.next_layer = end

    @torch.inference_mode()
    def advance_rows(self, run: ForwardPass, rows: slice) -> None:
        """Run layer `next_layer` on a slice of the local tokens (maybe empty), in place.

        The caller increments `next_layer`.
        """
        self._step_rows.by_rank = None
        num_tokens = rows.stop - rows.start
        taken = rows if num_tokens else slice(0, 1)  # a placeholder, as in `begin`
        hidden_T1C = run_layers(
            self.gpt.decoder,
            range(run.next_layer, run.next_layer + 1),
            run.hidden_T1C[taken],
            rotary_pos_emb=None if run.rope is None else run.rope[taken],
            packed_seq_params=replace(
                run.carrier,
                num_tokens=num_tokens,
                rotation=run.carrier.rotation and run.carrier.rotation.rows(taken),
            ),
        )
        if num_tokens:
            run.hidden_T1C[rows] = hidden_T1C

    @torch.inference_mode()
    def finish(self, run: ForwardPass) -> Tensor:
        """Apply the last norm after all layers have run: [T, 1, hidden_size]."""
        assert run.next_layer == self.num_layers, f"layer {run.next_layer} has not run"
        return run_final_norm(self.gpt.decoder, run.hidden_T1C)

    @torch.inference_mode()
    def feed_forward(
        self, hidden_T1C: Tensor, layers: range, sliced_rows: Sequence[int] | None
    ) -> None:
        """Run the feed-forward parts of some layers alone, to time them; see `begin`."""
        self._step_rows.by_rank = sliced_rows
        if not len(hidden_T1C):
            hidden_T1C = hidden_T1C.new_zeros(1, *hidden_T1C.shape[1:])
        for index in layers:
            self.gpt.decoder.layers[index].mlp(hidden_T1C)

    @torch.inference_mode()
    def logits(self, hidden_R1C: Tensor, sliced_rows: Sequence[int] | None = None) -> Tensor:
        """Logits [R, vocab] float32 of rows of `hidden`, the same rows on all TP ranks.

        With `sliced_rows`, the number of such rows on each SP rank, SP ranks share the work.
        """
        hidden_RC = hidden_R1C.squeeze(1)
        part = (
            self._output.whole(hidden_RC)
            if sliced_rows is None
            else self._output.sliced(hidden_RC, sliced_rows)
        )
        return all_gather_last_dim(part, self._tp)[:, : self._config.vocab_size].float()

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def vocab_shard(self) -> int:
        """Number of logit columns that a TP rank computes, padding included."""
        return padded_vocab_size(self._config.vocab_size, self._tp.size) // self._tp.size

    @torch.inference_mode()
    def shard_logits(self, hidden_R1C: Tensor) -> tuple[Tensor, int]:
        """Logits [R, v] float32 of this TP rank's part of the vocabulary, and its first token id.

        The part may be empty (v = 0). Nothing is sent.
        """
        first_id = self._tp.rank * self.vocab_shard
        num_here = min(max(self._config.vocab_size - first_id, 0), self.vocab_shard)
        return self._output.whole(hidden_R1C.squeeze(1))[:, :num_here].float(), first_id
