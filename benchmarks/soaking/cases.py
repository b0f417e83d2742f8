"""Requests of a soak with expected answers: mixed shapes, some abandoned midway, some invalid.

A case is drawn from known answers (offline generation of the same request), so that every token of
every text can be checked. Decides what is sent; `soaking.client` sends and checks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Ending = Literal["whole", "left", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Result of offline generation.

    `fields` are the request's (prompt as text, max_tokens, temperature, ..).
    """

    fields: dict[str, Any]
    prompt_ids: list[int] | None = None
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request, sent as `body`, and its expected outcome.

    `texts[i]` is choice i's answer, of which a client that leaves sees a part at most. `num_tokens`
    counts all choices together; None if a stop string decides. `leave_after` counts events of a
    stream, or seconds.
    """

    ending: Ending
    body: bytes
    stream: bool = False
    texts: tuple[str, ...] = ()
    num_tokens: int | None = None
    leave_after: float = 0.0
    status: int = 200
    shape: str = ""


@dataclass(slots=True)
class CaseMix:
    """Seeded draw of cases; `model` is the name for clients."""

    answers: Sequence[Answer]
    model: str
    max_model_len: int
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def draw(self, count: int) -> list[Case]:
        """`count` cases in mixed order; a fifth is abandoned midway and a tenth invalid."""
        num_left, num_invalid = count // 5, count // 10
        cases = [self._left() for _ in range(num_left)]
        cases += [self._invalid(number) for number in range(num_invalid)]
        cases += [self._whole() for _ in range(count - num_left - num_invalid)]
        self.source.shuffle(cases)
        return cases

    def _whole(self) -> Case:
        shape = self.source.choice(
            ("text", "ids", "several", "samples", "stop", "echo", "logprobs")
        )
        answer = self.source.choice(self.answers)
        stream = self.source.random() < 0.5
        fields = answer.fields | {"model": self.model, "stream": stream}
        if stream:
            fields["stream_options"] = {"include_usage": True}
        texts, num_tokens = (answer.text,), answer.num_tokens
        if shape == "ids" and answer.prompt_ids is not None:
            fields["prompt"] = answer.prompt_ids
        elif shape == "several":
            alike = [other for other in self.answers if _settings(other) == _settings(answer)]
            chosen = self.source.choices(alike, k=3)
            fields["prompt"] = [one.fields["prompt"] for one in chosen]
            texts = tuple(one.text for one in chosen)
            num_tokens = sum(one.num_tokens for one in chosen)
        elif shape == "samples" and not answer.fields.get("temperature"):
            fields["n"] = 2  # both samples are greedy and equal the answer
            texts, num_tokens = texts * 2, num_tokens * 2
        elif shape == "stop" and len(answer.text) > 3:
            place = self.source.randrange(1, len(answer.text) - 1)
            fields["stop"] = [answer.text[place : place + 2]]
            cut = answer.text.index(fields["stop"][0])
            return self._case("whole", fields, (answer.text[:cut],), None, shape)
        elif shape == "echo":
            fields["echo"] = True
            texts = (answer.fields["prompt"] + answer.text,)
        elif shape == "logprobs":
            fields["logprobs"] = self.source.randrange(3)
        return self._case("whole", fields, texts, num_tokens, shape)

    def _left(self) -> Case:
        """A case longer than its known answer, so that it is running when its client leaves."""
        answer = self.source.choice(self.answers)
        stream = self.source.random() < 0.7
        fields = answer.fields | {
            "model": self.model,
            "stream": stream,
            "max_tokens": 20 * answer.fields["max_tokens"],
        }
        after = self.source.randrange(12) if stream else self.source.uniform(0.0, 0.6)
        return self._case("left", fields, (answer.text,), None, "left", leave_after=after)

    def _invalid(self, number: int) -> Case:
        """An invalid request, each kind in turn."""
        good = {"model": self.model, "prompt": "x", "max_tokens": 2}
        kinds: list[tuple[Any, int]] = [
            (b'{"prompt": "x", "max_tok', 400),
            (b"\xff\xfe[]", 400),
            ({"model": self.model}, 400),
            (good | {"max_tokens": 0}, 400),
            (good | {"temperature": -1}, 400),
            (good | {"n": 0}, 400),
            (good | {"logprobs": 99}, 400),
            (good | {"prompt": {"text": "x"}}, 400),
            (good | {"prompt": [2**30]}, 400),
            (good | {"prompt": []}, 400),
            (good | {"tools": [{"type": "function"}]}, 400),
            (good | {"stream": "yes"}, 400),
            (good | {"model": "another"}, 404),
            (good | {"prompt": "x" * (self.max_model_len + 1)}, 413),
        ]
        body, status = kinds[number % len(kinds)]
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Case(ending="refused", body=raw, status=status, shape="invalid")

    def _case(
        self,
        ending: Ending,
        fields: dict[str, Any],
        texts: tuple[str, ...],
        num_tokens: int | None,
        shape: str,
        *,
        leave_after: float = 0.0,
    ) -> Case:
        return Case(
            ending=ending,
            body=json.dumps(fields).encode(),
            stream=fields["stream"],
            texts=texts,
            num_tokens=num_tokens,
            leave_after=leave_after,
            shape=shape,
        )


def _settings(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in answer.fields.items() if name != "prompt"}
