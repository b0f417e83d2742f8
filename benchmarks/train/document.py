"""A training document: bytes with a loss weight each, and events laid into code at given places.

Decides how an event (a definition, a question) gets its place between lines of code and how a
document gets exactly its length. What the events say is decided in `tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Event:
    """Pieces of text with the loss weight of their bytes, at `place` (0 to 1) of the document."""

    place: float
    pieces: list[tuple[str, float]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text, _ in self.pieces)

    def text(self) -> bytes:
        return "".join(text for text, _ in self.pieces).encode()

    def weights(self) -> list[float]:
        return [weight for text, weight in self.pieces for _ in text.encode()]


def room_for(events: list[Event], length: int) -> bool:
    """Whether the events leave some code in a document of `length` bytes."""
    return sum(event.num_bytes for event in events) <= 0.9 * length


def interleave(events: list[Event], length: int, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8) and loss weights (float32), both [length], of `code` with events between lines.

    Events stand in order of their places; one at place 1.0 is the very end. `code` should have
    twice `length`. Gaps end at a line's end, so the code before the first event takes up the
    difference.
    """
    events = sorted(events, key=lambda event: event.place)
    budget = length - sum(event.num_bytes for event in events)
    assert budget >= 0, "the caller chooses events by room_for"
    places = [event.place for event in events]
    gaps = [int(budget * (b - a)) for a, b in zip(places, [*places[1:], 1.0], strict=True)]

    texts: list[bytes] = []
    weights: list[float] = []
    # The code is one run of lines; the part before the first event ends at the first gap.
    source = code.tobytes()
    start = source.rfind(b"\n", 0, len(source) - sum(gaps)) + 1
    cursor = start
    for i, (event, gap) in enumerate(zip(events, gaps, strict=True)):
        last = i == len(events) - 1
        end = cursor + gap if last else source.rfind(b"\n", cursor, cursor + gap) + 1
        filler = source[cursor : max(end, cursor)]
        cursor = max(end, cursor)
        texts += [event.text(), filler]
        weights += [*event.weights(), *([1.0] * len(filler))]
    missing = length - len(weights)
    head = source[max(0, start - missing) : start]
    head = b"\n" * (missing - len(head)) + head
    text = b"".join([head, *texts])
    return (
        np.frombuffer(text, dtype=np.uint8),
        np.array([1.0] * len(head) + weights, dtype=np.float32),
    )
