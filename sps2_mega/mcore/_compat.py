"""All uses of Megatron-core beyond its documented API, and what differs between its releases.

    release         imports triton    local layer spec          GPTModel
    0.16.1, 0.17.1  no                0.17: passes arguments on
    0.18.2          yes, undeclared   passes arguments on
    0.19.2          yes, undeclared   passes arguments on,      logs that it is deprecated
                                      builds the MLP by a call

`tests/dist/test_megatron.py` fails when a release changes what is used here. It runs with the
release that is installed; `make test-megatron VERSION=...` runs it with another one.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sps2_mega.errors import ConfigError


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence warnings of Megatron and torch on import and construction, on which users cannot act.

    They concern missing optional packages (`sps2 doctor` reports those), names that newer torch
    deprecates, and since 0.19 GPTModel itself. Both ways are silenced: warnings and log records.
    """
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def eager_import(device_type: str) -> Iterator[None]:
    """Import Megatron on CPU without the compiler stack, a third of the import time.

    `megatron.core.jit` binds `torch.compile` when it is imported; on CPU its small fused
    functions stay eager for good, which suits CPU inference.

    Raises:
        ConfigError: a package is missing that Megatron imports without declaring it.
    """
    original = torch.compile
    if device_type == "cpu":
        torch.compile = lambda model=None, **_: (  # type: ignore[assignment]
            model if model is not None else (lambda fn: fn)
        )
    try:
        with without_warnings():
            import megatron.core  # noqa: F401

            yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing != "triton":
            raise
        raise ConfigError(
            f"megatron-core {version('megatron-core')} imports the package {missing} and does not "
            f"install it: pip install {missing}"
        ) from error
    finally:
        torch.compile = original


def replace_mlp(spec: Any, mlp: Any) -> None:
    """Make the layers of a local layer spec build their MLP with the class `mlp`."""
    made = spec.submodules.mlp
    if isinstance(made, functools.partial):  # since 0.19
        spec.submodules.mlp = functools.partial(mlp.as_mlp_submodule, *made.args, **made.keywords)
    else:
        made.module = mlp


def step_carrier_class() -> type:
    """Type that carries a step's attention through Megatron's layers to `core_attention`.

    Megatron passes `packed_seq_params` unchanged from `TransformerBlock.forward` down to the core
    attention, so a subclass of it is a way through without globals. Its format must not be 'thd',
    which would make Megatron squeeze tensors and choose another rotary path.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    @dataclass
    class StepCarrier(PackedSeqParams):
        qkv_format: str = "sbhd"
        attention: Any = None
        num_tokens: int = 0
        rotation: Any = None

    return StepCarrier


def run_layers(
    decoder: Any, layers: range, hidden_T1C: Tensor, *, rotary_pos_emb: Any, packed_seq_params: Any
) -> Tensor:
    """Run some layers as `TransformerBlock.forward` does: [T, 1, hidden_size] in and out.

    This is its loop, with the arguments of inference without Megatron's own caches; the code
    around that loop is for training, FP8 and offloading.
    """
    for index in layers:
        hidden_T1C, _ = decoder.layers[index](
            hidden_states=hidden_T1C,
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
    return hidden_T1C


def run_final_norm(decoder: Any, hidden_T1C: Tensor) -> Tensor:
    """Apply the final norm as `TransformerBlock.forward` does, for a block that has one."""
    normed: Tensor = decoder.final_layernorm(hidden_T1C)
    return normed
