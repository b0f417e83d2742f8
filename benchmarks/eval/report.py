"""Files of results: JSON, Markdown tables and pictures; and a join of several results.

Decides how numbers are shown, measures nothing; `pictures` draws.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.eval.summary import summary
from sps2_mega.errors import ConfigError

_SAME = ("model", "data", "seeds", "depths", "tasks")


def write_json(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n")


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write NAME.md, and with matplotlib NAME.png and NAME-frontier-LENGTH.png, beside `path`.

    `path` is NAME.json. The Markdown has the summary, then a table per length.
    """
    found = rounded(result)
    table = f"{summary(found)}\n\n{markdown(found)}"
    path.with_suffix(".md").write_text(table + "\n")
    print(table)
    try:
        from benchmarks.eval.pictures import frontier, heatmap

        if result["tasks"]:
            heatmap(result, path.with_suffix(".png"))
        for length in result["lengths"]:
            frontier(result, length, path.with_name(f"{path.stem}-frontier-{length}.png"))
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; install the extra 'bench'", file=sys.stderr)
    print(f"written: {path}")


def rounded(value: Any) -> Any:
    """Floats to 6 significant digits: more is noise, and files stay readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def merged(results: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """One result with the lengths of all, in ascending order; `names` are for messages.

    Raises:
        ConfigError: they are not of the same model, data, seeds, depths, tasks and settings, or a
            length is twice.
    """
    first = results[0]
    lengths = sorted(length for result in results for length in result["lengths"])
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f"results {', '.join(names)} have a length twice: {lengths}")
    for result, name in zip(results, names, strict=True):
        for key in _SAME:
            if result[key] != first[key]:
                raise ConfigError(f"{name} has {key} {result[key]}, {names[0]} {first[key]}")
        if list(result["settings"]) != list(first["settings"]):
            raise ConfigError(f"{name} and {names[0]} have different settings")
    return first | {
        "command": " && ".join(result["command"] for result in results),
        "lengths": lengths,
        "settings": {
            name: {
                str(length): result["settings"][name][str(length)]
                for length in lengths
                for result in results
                if length in result["lengths"]
            }
            for name in first["settings"]
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """Tables by length; tasks show the share answered exactly."""
    tasks = result["tasks"]
    lines = []
    for length in map(str, result["lengths"]):
        some = next(iter(result["settings"].values()))[length]
        head = ["setting", "FLOPs", "keys moved", "bytes moved", "keys read by decode"]
        head += ["bits per byte", "change", "KL from dense", *tasks]
        lines += [
            f"### {length} tokens",
            "",
            f"{some['text']['num_windows']} texts, {_num_probes(some, tasks)} probes per task.",
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *(_row(name, found[length], tasks) for name, found in result["settings"].items()),
            "",
        ]
    return "\n".join(lines).rstrip()


def _row(name: str, measured: dict[str, Any], tasks: list[str]) -> str:
    text, cost = measured["text"], measured["cost"]
    change = "" if name == "dense" else f"{text['delta_bits_per_byte']:+.4f}"
    if change and text["delta_standard_error"] is not None:
        change += f" ± {text['delta_standard_error']:.4f}"
    kl = text["kl_from_dense"]
    cells = [
        f"`{name}`",
        *(f"{cost[key]:.2f}" for key in ("flops", "keys_moved", "bytes_moved", "decode_keys")),
        f"{text['bits_per_byte']:.4f}",
        change,
        "" if kl is None or name == "dense" else f"{kl:.4f}",
        *(f"{100 * measured['tasks'][task]['exact']:.0f} %" for task in tasks),
    ]
    return "| " + " | ".join(cells) + " |"


def _num_probes(measured: dict[str, Any], tasks: list[str]) -> int:
    return measured["tasks"][tasks[0]]["num_probes"] if tasks else 0
