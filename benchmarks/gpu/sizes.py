"""Sizes of every part on a GPU, and tiny ones at which everything just starts on a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths in tokens; `model` is a name of model_configs/, started with random weights.

    `decode` are (batch, context) and `mixed` is (batch, shortest, longest) with contexts spread
    geometrically; `compared_decode` are those of them that transformers is timed on, since it
    compiles anew for each. A context that does not fit the KV cache is shortened.
    """

    model: str
    dtype: str
    prompts: tuple[int, ...]
    far_degrees: tuple[int, ...]
    cells: int
    decode: tuple[tuple[int, int], ...]
    compared_decode: tuple[tuple[int, int], ...]
    mixed: tuple[int, int, int]
    decode_steps: int
    sp: int
    sp_prompts: tuple[int, ...]
    host_batch: int
    host_prompt: int
    host_steps: int
    copied_bytes: int
    product: int  # width of the square product that stands for the matrix rate
    product_rows: tuple[int, ...]  # tokens that go through the model's products
    repeats: int
    kv_reserve_bytes: int  # device memory kept free beside weights and KV cache in decode


FULL = Sizes(
    model="llama-3-8b",
    dtype="bfloat16",
    prompts=(8192, 32768, 131072),
    far_degrees=(4, 8),
    cells=8,
    decode=(
        (1, 2048),
        (1, 32768),
        (1, 131072),
        (8, 8192),
        (8, 32768),
        (32, 2048),
        (32, 8192),
        (32, 32768),
        (64, 2048),
        (64, 14336),
    ),
    compared_decode=((1, 32768), (32, 2048)),
    mixed=(32, 512, 8192),
    decode_steps=30,
    sp=8,
    sp_prompts=(131072, 1048576),
    host_batch=32,
    host_prompt=256,
    host_steps=200,
    copied_bytes=2**32,
    product=8192,
    product_rows=(1, 32, 8192, 32768),
    repeats=3,
    kv_reserve_bytes=10 * 2**30,
)
TINY = Sizes(
    model="sps2-tiny",
    dtype="float32",
    prompts=(70, 130),
    far_degrees=(4,),
    cells=3,
    decode=((1, 50), (3, 17)),
    compared_decode=((3, 17),),
    mixed=(4, 5, 90),
    decode_steps=3,
    sp=4,
    sp_prompts=(130, 300),
    host_batch=4,
    host_prompt=9,
    host_steps=6,
    copied_bytes=2**16,
    product=64,
    product_rows=(1, 17),
    repeats=1,
    kv_reserve_bytes=0,
)
