"""Tokens on their way through the model of one rank, in one step or over several.

A pass runs through whole layers, or through each layer chunk by chunk. Between two steps it keeps
its hidden states and attention; the plan decides which part of it runs next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.mcore.gpt import GPT, ForwardPass
from sps2_mega.types import LayerSlice, PrefillItem
from sps2_mega.worker.batching import StepInput


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through the model; `prefills` are its prompts, one where it is chunked."""

    prefills: list[PrefillItem]
    step: StepInput
    run: ForwardPass

    @classmethod
    def begin(
        cls,
        model: GPT,
        prefills: list[PrefillItem],
        step: StepInput,
        on_layer: Callable[[int], None] | None,
        *,
        sliced: bool = False,
    ) -> Pass:
        """Embed the step's tokens.

        `on_layer` is called after each layer's attention, when the cache has the keys and values of
        all its tokens. With `sliced`, SP ranks share the weights of feed-forward layers.
        """
        step.attention.on_layer = on_layer
        rows = step.tokens_by_rank if sliced else None
        run = model.begin(step.tokens_T, step.positions_T, step.attention, rows)
        return cls(prefills, step, run)

    def advance(self, model: GPT, layers: LayerSlice | None) -> None:
        """Run what `layers` says, or all layers."""
        if layers is None:
            model.advance(self.run, model.num_layers)
        elif layers.chunked:
            self._advance_chunks(model, layers)
        else:
            model.advance(self.run, layers.end)

    def _advance_chunks(self, model: GPT, layers: LayerSlice) -> None:
        (item,), attention = self.prefills, self.step.attention
        chunks = attention.kind
        assert isinstance(chunks, ChunkedPrefill), "chunks of a pass that was laid out whole"
        for layer, start, end in layers.chunks(item.start, item.end):
            assert layer == self.run.next_layer, (
                f"the plan goes on in layer {layer}, the pass stands at layer {self.run.next_layer}"
            )
            rows = chunks.begin(start, end)
            attention.select_rows(rows, ends_layer=end == item.end)
            model.advance_rows(self.run, rows)
            if end == item.end:
                self.run.next_layer += 1
