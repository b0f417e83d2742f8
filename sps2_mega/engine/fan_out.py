"""Sequences of a request: one for each of its n samples, each with a seed of its own."""

from __future__ import annotations

from sps2_mega.types import SamplingParams, Sequence
from sps2_mega.worker.sampling.seeds import derive_seed, derive_seed_from_text


def fan_out(
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    first_seq_id: int,
    max_len: int,
    default_seed: int,
    arrival_time: float,
) -> list[Sequence]:
    """Sequences of a request's n samples, numbered from `first_seq_id`.

    A request without a seed gets one derived from `default_seed` and its id. All samples have the
    same prompt, so only the first one scores it.

    Args:
        request_id: name of the request.
        prompt_token_ids: shared by all samples, not copied.
        params: of the request.
        first_seq_id: id of the first sample.
        max_len: longest prompt plus output, in tokens.
        default_seed: the job's seed.
        arrival_time: seconds of time.monotonic().
    """
    seed = params.seed
    if seed is None:
        seed = derive_seed_from_text(default_seed, request_id)
    room = max(1, max_len - len(prompt_token_ids))
    unscored = params.replace(prompt_logprobs=None)
    return [
        Sequence(
            seq_id=first_seq_id + index,
            prompt_token_ids=prompt_token_ids,
            params=unscored if index else params,
            seed=derive_seed(seed, index),
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            arrival_time=arrival_time,
        )
        for index in range(params.n)
    ]
