"""Retrieval probes: a prompt whose continuation can only be known from something far back in it.

Decides the kinds of probes, their wording and when an answer is right. One answer stands at the
very end, so a probe has a depth; `benchmarks.train.tasks` has documents with questions all over.

    passkey        one number
    key_value      ten names with numbers; the question names one
    reference      the same, but the name in question is defined by another name: the answer is that
                   name and its number
    multi_needle   three numbers of one list, in order; the first is at the depth
    copy           48 letters without meaning, to be written again
    second_turn    key_value, after another name's question and answer: a prompt behind a cached one
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from benchmarks.eval.texts import Texts, bos_prefix
from benchmarks.train.document import Event, interleave
from benchmarks.train.tasks import digits, names
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

TASKS = ("passkey", "key_value", "reference", "multi_needle", "copy", "second_turn")
DEPTHS = (0.05, 0.275, 0.5, 0.725, 0.95)
_NUM_NEEDLES = 3
_NUM_NAMES = 10
_COPY_LEN = 48
_SHORTEST = 300  # bytes that the longest task and a little code need
_ATTEMPTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A prompt and its answer, together at most `length` tokens, and not much less.

    With `question_ids` the prompt is a first turn, which is answered by `new_tokens` too, and the
    question follows in a second one.
    """

    task: str
    length: int
    depth: float
    seed: int
    prompt_ids: list[int]
    answer: str
    new_tokens: int
    question_ids: list[int] = field(default_factory=list)


def judge(answer: str, text: str) -> tuple[bool, float]:
    """(whether `text` begins with the answer, the share of the answer that it begins with)."""
    same = 0
    for wanted, given in zip(answer, text, strict=False):
        if wanted != given:
            break
        same += 1
    return same == len(answer), same / len(answer)


def make_probe(
    task: str,
    *,
    length: int,
    depth: float,
    index: int,
    seed: int,
    texts: Texts,
    tokenizer: Tokenizer,
) -> Probe:
    """Probe number `index`; equal arguments give equal probes.

    Args:
        task: a kind of probe, of those listed above.
        length: tokens of prompt and answer together, at most.
        depth: place of what must be found, from 0 (beginning) to 1 (end).
        index: number of the probe among those of the same length and depth.
        seed: of all random choices, together with the other arguments.
        texts: held-out texts by name, which fill the prompt.
        tokenizer: the model's own.

    Raises:
        ConfigError: `length` is too short for the task.
    """
    numbers = [seed, length, int(1000 * depth), index, zlib.crc32(task.encode())]
    prefix = bos_prefix(tokenizer)
    wanted = length - len(prefix)
    size = wanted
    best: Probe | None = None
    best_total = 0
    for _ in range(_ATTEMPTS):
        if size < _SHORTEST:
            break
        text = _text(task, size, depth, np.random.default_rng(numbers), texts)
        ids = tokenizer.encode(text.prompt, add_special_tokens=False)
        answer_ids = tokenizer.encode(text.answer, add_special_tokens=False)
        exact = len(ids) == len(text.prompt.encode())
        # A tokenizer of words joins the last blank with the answer's first word.
        ids, question_ids = (
            tokenizer.encode(part if exact else part.rstrip(" "), add_special_tokens=False)
            for part in (text.prompt, text.question)
        )
        new_tokens = len(answer_ids) + (0 if exact else 2)
        total = (
            len(ids) + len(answer_ids) + (new_tokens + len(question_ids) if text.question else 0)
        )
        if total <= wanted and (best is None or total > best_total):
            best_total = total
            best = Probe(
                task=task,
                length=length,
                depth=depth,
                seed=seed,
                prompt_ids=prefix + ids,
                answer=text.answer,
                new_tokens=new_tokens,
                question_ids=question_ids,
            )
        if 0.97 * wanted <= total <= wanted:
            break
        size = int(size * wanted / total * (1.0 if total < wanted else 0.99))
    if best is None:
        raise ConfigError(f"task {task} does not fit {length} tokens; take longer --lengths")
    return best


@dataclass(frozen=True, slots=True)
class _Text:
    """Text of a probe; the answer is to the `question` of the second turn if there is one."""

    prompt: str
    answer: str
    question: str = ""


def _text(task: str, num_bytes: int, depth: float, rng: np.random.Generator, texts: Texts) -> _Text:
    """Text of a probe, `num_bytes` long with its answer if the source texts are ASCII."""
    code = _code(texts, num_bytes, rng)
    if task in ("passkey", "key_value", "reference"):
        from benchmarks.train.evaluate import probe

        document, answer = probe(task, num_bytes, depth, rng, {"code": code})
        return _Text(_decode(document[: -len(answer)]), answer)
    if task == "second_turn":
        events, first, question, answer = _second_turn(rng, depth)
        size = num_bytes - len(question) - len(answer)
        document, _ = interleave(events, size, code)
        return _Text(_decode(document[: -len(first)]), answer, question)
    events, answer = (_multi_needle if task == "multi_needle" else _copy)(rng, depth)
    document, _ = interleave(events, num_bytes, code)
    return _Text(_decode(document[: -len(answer)]), answer)


def _decode(document: np.ndarray) -> str:
    return document.tobytes().decode(errors="replace")


def _second_turn(rng: np.random.Generator, depth: float) -> tuple[list[Event], str, str, str]:
    """Events of the first turn with its answer, that answer, the second question and its answer."""
    known = names(rng, _NUM_NAMES)
    values = [digits(rng, 5) for _ in known]
    places = [depth, *rng.uniform(0.02, 0.95, _NUM_NAMES - 1)]
    events = [
        Event(place, [(f"{name} = {value}\n", 1.0)])
        for name, value, place in zip(known, values, places, strict=True)
    ]
    events.append(Event(1.0, [(f"assert {known[1]} == {values[1]}", 1.0)]))
    return events, values[1], f"\nassert {known[0]} == ", values[0]


def _multi_needle(rng: np.random.Generator, depth: float) -> tuple[list[Event], str]:
    (name,) = names(rng, 1)
    places = [depth, *np.sort(rng.uniform(depth, max(depth, 0.97), _NUM_NEEDLES - 1))]
    values = [digits(rng, 3) for _ in places]
    events = [
        Event(place, [(f"{name}.append({value})\n", 1.0)])
        for place, value in zip(places, values, strict=True)
    ]
    answer = ", ".join(values)
    return [*events, Event(1.0, [(f"assert {name} == [{answer}", 1.0)])], answer


def _copy(rng: np.random.Generator, depth: float) -> tuple[list[Event], str]:
    (tag,) = names(rng, 1)
    span = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz_"), _COPY_LEN))
    first = Event(depth, [(f"# begin {tag}\n{span}\n# end\n", 1.0)])
    return [first, Event(1.0, [(f"# again {tag}\n{span}", 1.0)])], span


def _code(texts: Texts, num_bytes: int, rng: np.random.Generator) -> np.ndarray:
    """Twice `num_bytes` of one text, or of all texts in sequence if none is that long."""
    long = [text for text in texts.values() if len(text) >= 2 * num_bytes]
    if long:
        text = long[rng.integers(len(long))]
    else:
        joined = b"\n".join(texts.values())
        text = joined * (2 * num_bytes // max(1, len(joined)) + 1)
    start = rng.integers(len(text) - 2 * num_bytes + 1)
    return np.frombuffer(text[start : start + 2 * num_bytes], dtype=np.uint8)
