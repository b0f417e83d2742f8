"""Measured limits of the card: bandwidth of a copy, and cuBLAS on the model's products."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device_time
from benchmarks.gpu.part import Part
from sps2_mega.checkpoint.canonical import layer_shapes
from sps2_mega.checkpoint.resolve import resolve_model


def run(part: Part) -> None:
    sizes = part.sizes
    part.case(
        {"case": "copy"},
        lambda: {
            "bytes_per_s": device_time.copy_bandwidth(
                part.device, sizes.copied_bytes, sizes.repeats
            )
        },
    )
    square = sizes.product
    part.case({"case": "product"}, lambda: _product(part, square, square, square))
    model = resolve_model(sizes.model, needs_weights=False).config
    products = {name: shape for name, shape in layer_shapes(model) if len(shape) == 2}
    for rows in sizes.product_rows:
        for name, (outputs, inputs) in products.items():
            part.case(
                {"case": "layer product", "name": name},
                partial(_product, part, rows, outputs, inputs),
            )


def _product(part: Part, rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    """Time x [rows, inputs] times a weight [outputs, inputs].

    Both are random: zeros would run faster than real data.
    """

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=part.dtype, device=part.device)

    x = made(rows, inputs)
    # Few rows are limited by reading the weight: take so many weights that no cache holds them.
    copies = max(1, min(8, part.sizes.copied_bytes // 4 // (outputs * inputs)))
    weights = [made(outputs, inputs) for _ in range(copies)]
    work = device_time.in_graph(
        [partial(torch.nn.functional.linear, x, weight) for weight in weights], part.device
    )
    taken = device_time.medians({"product": work}, part.device, part.sizes.repeats)["product"]
    seconds = taken / copies
    moved = (rows * inputs + outputs * inputs + rows * outputs) * x.itemsize
    return {
        "shape": [rows, outputs, inputs],
        "seconds": seconds,
        "flops_per_s": 2.0 * rows * outputs * inputs / seconds,
        "bytes_per_s": moved / seconds,
    }
