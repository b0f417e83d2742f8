"""Table over all lengths: a setting's cost at a long context beside its loss at the measured ones.

Decides what is left out: the tables by length (`report`) and the JSON have everything.
"""

from __future__ import annotations

from typing import Any

from benchmarks.eval.costs import FAR_LENGTH


def summary(result: dict[str, Any]) -> str:
    """Markdown table; several lengths share a cell in the result's order, as `100 / 73`."""
    lengths = [str(length) for length in result["lengths"]]
    tasks = result["tasks"]
    at = f"at {FAR_LENGTH // 1024}K"
    head = [
        "setting",
        f"FLOPs {at}",
        f"bytes {at}",
        f"decode reads {at}",
        "bits per byte, change in %",
    ]
    lines = [
        f"Lengths {' / '.join(lengths)}; exact answers in %; ± is the standard error.",
        "",
        "| " + " | ".join([*head, *tasks]) + " |",
        "|---" * (len(head) + len(tasks)) + "|",
    ]
    dense = result["settings"]["dense"]
    for name, found in result["settings"].items():
        cost = found[lengths[-1]]["cost"][f"at_{FAR_LENGTH}"]
        cells = [f"`{name}`"]
        cells += [f"{cost[key]:.2f}" for key in ("flops", "bytes_moved", "decode_keys")]
        cells.append(" / ".join(_change(found[n]["text"], dense[n]["text"]) for n in lengths))
        for task in tasks:
            shares = [100 * found[n]["tasks"][task]["exact"] for n in lengths]
            cells.append(" / ".join(f"{share:.0f}" for share in shares))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(text: dict[str, Any], dense: dict[str, Any]) -> str:
    """Mean change relative to dense bits per byte."""
    if text is dense:
        return "0"
    per_cent = 100 / dense["bits_per_byte"]
    error = text["delta_standard_error"]
    words = f"{text['delta_bits_per_byte'] * per_cent:+.1f}"
    return words if error is None else f"{words} ± {error * per_cent:.1f}"
