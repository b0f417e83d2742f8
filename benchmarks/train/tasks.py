"""Generated documents whose loss can only be lowered by reading something far back.

Decides the kinds of tasks, their wording and which bytes count how much. Bytes that nobody can know
(a new name, a new value) weigh nothing; the bytes of an answer weigh more than code, the first one
most, because it is the one that has to be found: the others follow it.

    definition   key_ab3f = 71920            weight 0 for name and value
    code         (anything, any length)      weight 1
    question     assert key_ab3f == 71920    weight FIRST for the 7, REST for 1920

Placement between the code is decided in `document`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.train.document import Event, interleave, room_for

FIRST, REST, NAME = 8.0, 3.0, 0.4
_WORDS = [
    "key",
    "value",
    "limit",
    "port",
    "size",
    "token",
    "index",
    "level",
    "width",
    "count",
    "offset",
    "timeout",
]
_HEX = "0123456789abcdef"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Definition and question of one value; {n} is the name, the answer follows the question.
_FORMS = (
    ("{n} = ", "\n", "assert {n} == ", "\n"),
    ("{n} = ", "\n", "{n} = ", "\n"),
    ("{n} = ", "\n", "print({n})  # ", "\n"),
    ("    '{n}': ", ",\n", "        self.assertEqual(d['{n}'], ", ")\n"),
    ("# {n} is ", ".\n", "# {n} is ", ".\n"),
)
_FORM_SHARES = np.array([0.4, 0.25, 0.1, 0.15, 0.1])


def digits(rng: np.random.Generator, count: int) -> str:
    return str(rng.integers(1, 10)) + "".join(map(str, rng.integers(0, 10, count - 1)))


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct names of one style, which therefore differ in few characters."""
    word, letters = rng.choice(_WORDS), (_HEX if rng.random() < 0.7 else _LETTERS)
    upper, length = rng.random() < 0.15, 4 if rng.random() < 0.8 else int(rng.integers(2, 7))
    found: dict[str, None] = {}
    while len(found) < count:
        suffix = "".join(rng.choice(list(letters), length))
        name = f"{word}_{suffix}"
        found[name.upper() if upper else name] = None
    return list(found)


def key_value(rng: np.random.Generator, length: int) -> list[Event]:
    """Values defined once and queried later, often more than once."""
    num_keys = int(rng.integers(2, max(3, min(16, length // 60))))
    return _definitions_and_questions(rng, length, num_keys, references=0)


def reference(rng: np.random.Generator, length: int) -> list[Event]:
    """Values as in `key_value`, some of them behind a second name: two hops.

    A question needs both: `assert key_07c1 == key_ab3f == 71920`.
    """
    num_keys = int(rng.integers(2, max(3, min(8, length // 90))))
    return _definitions_and_questions(rng, length, num_keys, references=max(1, num_keys // 2))


def _definitions_and_questions(
    rng: np.random.Generator, length: int, num_keys: int, references: int
) -> list[Event]:
    define, end, ask, ask_end = _FORMS[0 if references else rng.choice(5, p=_FORM_SHARES)]
    width = 5 if rng.random() < 0.7 else int(rng.integers(2, 9))
    known = names(rng, num_keys + references)
    last_definition, first_question = (0.9, 0.0) if rng.random() < 0.5 else (0.6, 0.6)
    facts: list[tuple[str, str, str, float]] = []  # name, name that it refers to, value, place
    events: list[Event] = []
    for name in known[:num_keys]:
        value, place = digits(rng, width), rng.uniform(0, last_definition)
        events.append(Event(place, _pieces(define, name, 0.0, (value, 0.0), end)))
        facts.append((name, "", value, place))
    for name in known[num_keys:]:
        target, _, value, place = facts[rng.integers(num_keys)]
        place = rng.uniform(place, max(place, last_definition))
        events.append(Event(place, _pieces(define, name, 0.0, (target, NAME), end)))
        facts.append((name, target, value, place))
    asked = facts[num_keys:] * 2 + facts if references else facts
    for _ in range(int(rng.integers(max(1, length // 120), max(2, length // 55)))):
        name, target, value, place = asked[rng.integers(len(asked))]
        place = rng.uniform(max(place, first_question), 1.0)
        hop = [(target, REST), (" == ", 1.0)] if target else []
        question = Event(place, [*_pieces(ask, name, NAME), *hop, *_answer(value), (ask_end, 1.0)])
        if not room_for([*events, question], length):
            break
        events.append(question)
    return events


def passkey(rng: np.random.Generator, length: int) -> list[Event]:
    """One value anywhere, queried at the end."""
    value = digits(rng, 5)
    place = rng.uniform(0, 0.9)
    if rng.random() < 0.5:
        said, asked, end = "# The pass key is ", "# What is the pass key? The pass key is ", ".\n"
    else:
        said, asked, end = "PASSKEY = ", "assert PASSKEY == ", "\n"
    return [
        Event(place, [(said, 0.0), (value, 0.0), (end, 1.0)]),
        Event(rng.uniform(max(place, 0.8), 1.0), [(asked, 0.2), *_answer(value), (end, 1.0)]),
    ]


def multi_needle(rng: np.random.Generator, length: int) -> list[Event]:
    """Several values of one name, scattered, queried together and in order."""
    events: list[Event] = []
    for name in names(rng, int(rng.integers(1, 3))):
        places = np.sort(rng.uniform(0, 0.85, rng.integers(2, 5)))
        values = [digits(rng, 3) for _ in places]
        for place, value in zip(places, values, strict=True):
            pieces = [(f"{name}.append(", NAME), (value, 0.0), (")\n", 1.0)]
            events.append(Event(place, pieces))
        pieces = [("assert ", 0.0), (name, NAME), (" == [", 1.0)]
        for i, value in enumerate(values):
            pieces += [(", ", 1.0)] if i else []
            pieces += _answer(value)
        events.append(Event(rng.uniform(0.87, 1.0), [*pieces, ("]\n", 1.0)]))
    return events


def copy(rng: np.random.Generator, length: int) -> list[Event]:
    """A span without meaning that is repeated later; the tag says which."""
    events: list[Event] = []
    for tag in names(rng, int(rng.integers(1, 3))):
        letters = list(_LETTERS + " _.(")
        span = "".join(rng.choice(letters, rng.integers(12, max(13, min(120, length // 8)))))
        place = rng.uniform(0, 0.8)
        events.append(Event(place, [("# begin ", 0.0), (tag, 0.0), ("\n", 1.0), (span, 0.0)]))
        events[-1].pieces.append(("\n# end\n", 0.0))
        again = [("# again ", 0.0), (tag, NAME), ("\n", 1.0), (span[0], 4.0), (span[1:], 1.5)]
        events.append(Event(rng.uniform(max(place, 0.4), 1.0), [*again, ("\n# end\n", 1.0)]))
    return events


KINDS: dict[str, Callable[[np.random.Generator, int], list[Event]]] = {
    "key_value": key_value,
    "reference": reference,
    "passkey": passkey,
    "multi_needle": multi_needle,
    "copy": copy,
}


def make_document(
    kind: str, rng: np.random.Generator, length: int, code: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and loss weights, [length] each, of a task of `kind` (a key of KINDS) in `code`."""
    events = KINDS[kind](rng, length)
    while not room_for(events, length):
        events = KINDS[kind](rng, length)
    return interleave(events, length, code)


def _pieces(
    form: str, name: str, weight: float, value: tuple[str, float] | None = None, end: str = ""
) -> list[tuple[str, float]]:
    before, after = form.split("{n}")
    pieces = [(before, 0.0), (name, weight), (after, 1.0)]
    return [*pieces, value, (end, 1.0)] if value else pieces


def _answer(value: str) -> list[tuple[str, float]]:
    return [(value[:1], FIRST), (value[1:], REST)]
