"""Measured cases as short lines and as bars: times against the ceilings of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def matrix_rate(rows: Rows) -> float | None:
    """FLOP/s of the large square product."""
    return next(
        (row["flops_per_s"] for row in rows if row["case"] == "product" and "flops_per_s" in row),
        None,
    )


def lines(rows: Rows) -> list[str]:
    """One line per case, failed and skipped ones too."""
    rate = matrix_rate(rows)
    return [_line(row, rows, rate) for row in rows if row["case"] != "layer product"]


def _line(row: dict[str, Any], rows: Rows, rate: float | None) -> str:
    what = row["case"]
    for key in (
        "by",
        "transport",
        "degrees",
        "batch",
        "context",
        "prompt",
        "tokens",
        "sampling",
        "graphs",
    ):
        if key in row:
            value = row[key]
            what += f" {key}={','.join(map(str, value)) if isinstance(value, list) else value}"
    for problem in ("error", "skipped"):
        if problem in row:
            return f"{what}: {problem}: {row[problem][:100]}"
    parts = []
    for key, unit, scale in (
        ("seconds", "ms", 1e3),
        ("layer_s", "ms/layer", 1e3),
        ("attention_s", "ms/layer", 1e3),
        ("kernel_seconds", "ms in kernels", 1e3),
        ("tokens_per_s", "tokens/s", 1.0),
        ("flops_per_s", "TFLOP/s", 1e-12),
        ("bytes_per_s", "TB/s", 1e-12),
        ("share_of_bound", "of the bound", 1.0),
    ):
        if row.get(key) is not None:
            parts.append(f"{row[key] * scale:.4g} {unit}")
    if rate and "flops_per_s" in row and row["case"] != "product":
        parts.append(f"{row['flops_per_s'] / rate:.2f} of the matrix rate")
    if "pieces" in row:
        pieces = (f"{name} {1e3 * taken:.3f}" for name, taken in row["pieces"].items())
        parts.append(f"host {1e3 * row['host_seconds']:.3f} ms; ms: " + ", ".join(pieces))
    ratio = _against_transformers(row, rows)
    if ratio:
        parts.append(f"{ratio:.2f}x transformers")
    return f"{what}: " + ", ".join(parts)


def _against_transformers(row: dict[str, Any], rows: Rows) -> float | None:
    """Our tokens/s over transformers', if both were measured on the same lengths."""
    same = ("tokens", "batch", "context")
    for other in rows:
        if (
            other["case"] == f"{row['case']} transformers"
            and "tokens_per_s" in row
            and "tokens_per_s" in other
            and all(row.get(key) == other.get(key) for key in same)
        ):
            return float(row["tokens_per_s"] / other["tokens_per_s"])
    return None


def plot(rows: Rows, path: Path) -> None:
    """Left: prefill, tokens/s. Right: decode, share of the bandwidth bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    prefill = [r for r in rows if r["case"].startswith("prefill") and "tokens_per_s" in r]
    names = [
        f"{r['tokens']} "
        + ("transformers" if "degrees" not in r else "CSA " + ",".join(map(str, r["degrees"])))
        for r in prefill
    ]
    bars = left.barh(names, [r["tokens_per_s"] for r in prefill])
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.set_xlabel("prefill, tokens/s (CSA 1: exact)")
    left.invert_yaxis()
    decode = [r for r in rows if r["case"].startswith("decode") and "share_of_bound" in r]
    names = [
        f"batch {r['batch']} x {r['context'] if isinstance(r['context'], int) else 'mixed'}"
        + (" graphs" if r.get("graphs") else "")
        for r in decode
    ]
    bars = right.barh(names, [r["share_of_bound"] for r in decode])
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlabel("decode, share of the bandwidth bound")
    right.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
