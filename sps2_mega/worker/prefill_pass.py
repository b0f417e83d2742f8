"""Tokens on their way through the model of one rank, maybe over several steps: through whole
layers, or chunk by chunk.

Between two steps a pass keeps its hidden states and attention; which part of it runs next is the
plan's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.attention.watched import WatchedAttention
from sps2_mega.mcore.core_attention import StepAttention
from sps2_mega.mcore.gpt import GPT, ForwardPass
from sps2_mega.types import LayerSlice, PrefillItem
from sps2_mega.worker.batching import StepInput


@dataclass(frozen=True, slots=True)
class Pass:
    """`prefills` are its prompts, one where it is `chunked`. `on_layer` hears of each layer of a
    chunked pass that all of its tokens have gone through; of others the attention tells it."""

    prefills: list[PrefillItem]
    step: StepInput
    run: ForwardPass
    on_layer: Callable[[int], None] | None = None

    @classmethod
    def begin(
        cls,
        model: GPT,
        prefills: list[PrefillItem],
        step: StepInput,
        on_layer: Callable[[int], None] | None,
    ) -> Pass:
        """Embeds the step's tokens. `on_layer` hears when the cache has a layer's new keys and
        values."""
        attention: StepAttention = step.attention
        chunked = isinstance(attention, ChunkedPrefill)
        if on_layer is not None and not chunked:
            attention = WatchedAttention(attention, on_layer)
        run = model.begin(step.tokens_T, step.positions_T, attention)
        return cls(prefills, step, run, on_layer if chunked else None)

    def advance(self, model: GPT, layers: LayerSlice | None) -> None:
        """Runs what `layers` say, or all layers."""
        if layers is None:
            model.advance(self.run, model.num_layers)
        elif layers.chunked:
            self._advance_chunks(model, layers)
        else:
            model.advance(self.run, layers.end)

    def _advance_chunks(self, model: GPT, layers: LayerSlice) -> None:
        (item,), attention = self.prefills, self.step.attention
        assert isinstance(attention, ChunkedPrefill), "chunks of a pass that was laid out whole"
        for layer, start, end in layers.chunks(item.start, item.end):
            assert layer == self.run.next_layer, (
                f"the plan goes on in layer {layer}, the pass stands at layer {self.run.next_layer}"
            )
            model.advance_rows(self.run, attention.begin(start, end))
            if end == item.end:
                self.run.next_layer += 1
                if self.on_layer is not None:
                    self.on_layer(layer)
