"""One layer's prefill attention: torch's libraries, flex_attention and the runtime, same tensors.

flex_attention gets the same CSA pattern, as a mask by positions and KV head, and skips blocks that
nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import device_time
from benchmarks.gpu.part import Part
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.pieces import csa_pieces
from sps2_mega.attention.layout.causal_pairs import causal_pairs
from sps2_mega.attention.planner.sparse_volume import flops_ratio
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.kernels.attention.sdpa import attend_run
from sps2_mega.kernels.csa.dispatch import attend_pieces

_LIBRARIES = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")


def run(part: Part) -> None:
    model = resolve_model(part.sizes.model, needs_weights=False).config
    for tokens in part.sizes.prompts:
        q, k, v = (
            torch.randn(tokens, heads, model.head_dim, dtype=part.dtype, device=part.device)
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
        flops = 4.0 * model.head_dim * model.num_heads * causal_pairs(range(tokens))
        scale = model.head_dim**-0.5
        for name, attend in _dense(part, q, k, v, scale).items():
            part.case(
                {"case": "attention", "tokens": tokens, "degrees": [1], "by": name},
                partial(_timed, part, attend, flops),
                seconds=flops / 20e12 if part.on_cuda else 0.0,
            )
        for far in part.sizes.far_degrees:
            pattern = _pattern(part, tokens, far)
            where = dict(prompt_len=tokens, kv_heads=range(model.num_kv_heads), layer=0)
            ratio = flops_ratio(pattern, **where)  # type: ignore[arg-type]
            pieces = csa_pieces(pattern, queries=range(tokens), **where)  # type: ignore[arg-type]
            contestants: dict[str, Callable[[], Any]] = {
                "runtime": partial(attend_pieces, q, k, v, pieces, scale=scale),
                "flex_attention": _Flex(part, q, k, v, scale, pattern),
            }
            for name, attend in contestants.items():
                part.case(
                    {"case": "attention", "tokens": tokens, "degrees": [1, far], "by": name},
                    partial(_timed, part, attend, flops * ratio),
                    seconds=flops / 20e12 if part.on_cuda else 0.0,
                )


def _dense(
    part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> dict[str, Callable[[], Any]]:
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    sdpa = partial(
        torch.nn.functional.scaled_dot_product_attention,
        *heads_first,
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )

    def through(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa()

    names = _LIBRARIES if part.on_cuda else ("FLASH_ATTENTION",)
    libraries = {f"torch {name}": partial(through, getattr(SDPBackend, name)) for name in names}
    return libraries | {
        "runtime": partial(attend_run, q, k, v, scale=scale, q_start=0),
        "flex_attention": _Flex(part, q, k, v, scale, None),
    }


class _Flex:
    """flex_attention compiled for one pattern at the first call, which is the warm-up."""

    def __init__(
        self,
        part: Part,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        pattern: CSAPattern | None,
    ) -> None:
        self._tensors = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        self._part, self._scale, self._pattern = part, scale, pattern
        self._call: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        if self._call is None:
            self._call = self._made()
        return self._call()

    def _made(self) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, _ = self._tensors
        group, tokens = q.shape[1] // k.shape[1], q.shape[2]
        per_head = self._pattern is not None
        mask = create_block_mask(
            self._visible(group),
            B=None,
            H=q.shape[1] if per_head else None,
            Q_LEN=tokens,
            KV_LEN=tokens,
            device=self._part.device.type,
            # At long lengths the whole mask would not fit in memory; compiled it is never made.
            _compile=self._part.on_cuda,
        )
        attend = torch.compile(flex_attention) if self._part.on_cuda else flex_attention
        return partial(attend, *self._tensors, block_mask=mask, scale=self._scale, enable_gqa=True)

    def _visible(self, group: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        pattern = self._pattern
        if pattern is None:
            return lambda _b, _h, i, j: j <= i
        (cell,), far = pattern.spans, pattern.degrees[1]
        sinks, halo = pattern.sinks, pattern.halo
        dense_from = self._tensors[0].shape[2] - pattern.tail

        def visible(_b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            near = (j >= i // cell * cell - halo) | (j < sinks) | (i >= dense_from)
            # The key in `far` that a KV head sees; the runtime deals remainders to heads likewise.
            return (j <= i) & (near | (j % far == head // group % far))

        return visible


def _pattern(part: Part, tokens: int, far: int) -> CSAPattern:
    cell = -(-tokens // part.sizes.cells)
    return CSAPattern(
        degrees=(1, far),
        spans=(cell,),
        sinks=min(16, cell // 8),
        halo=min(128, cell // 8),
        tail=min(128, cell // 8),
        sample_queries=False,
    )


@torch.inference_mode()
def _timed(part: Part, attend: Callable[[], Any], flops: float) -> dict[str, Any]:
    taken = device_time.medians({"it": attend}, part.device, part.sizes.repeats)["it"]
    return {"seconds": taken, "flops_per_s": flops / taken}
