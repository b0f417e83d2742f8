"""Facts of the simulated hardware: one GPU, its node and its links, each figure with its source.

    hardware/<name>.yaml   the GPU, and the names of its two links
    hardware/links.yaml    the links; a file may bring its own, as `benchmarks/calibrate.py` does

No figure is accepted without a source. The cost terms compute with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sps2_mega.bundled import bundled_folders
from sps2_mega.errors import ConfigError
from sps2_mega.parallel.machine import Link, Machine

# Optional figures of a link and of a file: neutral where nobody measured them.
_OF_LINKS = ("exchange_factor", "stream_factor", "reduce_factor", "reduce_latency_s")
_MEASURED = ("step_overhead_s", "call_s", "merge_s", "copy_s", "kv_bytes_per_s", *_OF_LINKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Nodes of equal GPUs.

    `*_per_s` are peak figures, of which the efficiencies are reached; FLOPs count a multiply and an
    add as two. `layer_overhead_s` are gaps between the small kernels of one layer. Links are per
    GPU and one direction, as reached. The last nine are neutral where nobody measured them:
    the host's share of a step; `call_s`, `merge_s` and `copy_s` as in `Machine`; bytes of keys and
    values that decode attention reads per second (0: as memory gives); the factors by which
    all-to-alls between nodes, one at a time or several under way, and sums exceed what the link's
    rate says; and the seconds of a small sum among nodes (0: a latency for each other node).

    Raises:
        ConfigError: a figure is not positive (the last nine: negative), or an efficiency above 1.
    """

    name: str
    gpu: str
    peak_flops_per_s: float
    gemm_efficiency: float
    attention_efficiency: float
    memory_bytes: float
    memory_bytes_per_s: float
    memory_efficiency: float
    layer_overhead_s: float
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    step_overhead_s: float = 0.0
    call_s: float = 0.0
    merge_s: float = 0.0
    copy_s: float = 0.0
    kv_bytes_per_s: float = 0.0
    exchange_factor: float = 1.0
    stream_factor: float = 1.0
    reduce_factor: float = 1.0
    reduce_latency_s: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _MEASURED:
                if not value >= 0:
                    raise ConfigError(
                        f"hardware {self.name}: {field.name} must be >= 0, got {value}"
                    )
            elif isinstance(value, float | int) and not value > 0:
                raise ConfigError(f"hardware {self.name}: {field.name} must be > 0, got {value}")
            if field.name.endswith("_efficiency") and value > 1:
                raise ConfigError(f"hardware {self.name}: {field.name} must be <= 1, got {value}")

    @property
    def gemm_flops_per_s(self) -> float:
        return self.peak_flops_per_s * self.gemm_efficiency

    @property
    def attention_flops_per_s(self) -> float:
        return self.peak_flops_per_s * self.attention_efficiency

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes that one GPU reads from its memory per second."""
        return self.memory_bytes_per_s * self.memory_efficiency

    def replace(self, **changes: Any) -> Hardware:
        return dataclasses.replace(self, **changes)

    def sp_machine(self, tp: int, sp: int) -> Machine:
        """SP levels and links in the planner's form; the ranks of a TP group are neighbours.

        Raises:
            ConfigError: TP groups or SP levels do not fill whole nodes.
        """
        if self.gpus_per_node % tp and tp % self.gpus_per_node:
            raise ConfigError(
                f"tp={tp} must divide, or be a multiple of, the {self.gpus_per_node} GPUs of a node"
            )
        per_node = min(sp, max(1, self.gpus_per_node // tp))
        if sp % per_node:
            raise ConfigError(f"sp={sp} must be a multiple of the {per_node} SP ranks of a node")
        levels = [(per_node, self.intra_node), (sp // per_node, self.inter_node)]
        kept = [level for level in levels if level[0] > 1] or levels[:1]
        return Machine(
            sp_levels=tuple(size for size, _ in kept),
            links=tuple(link for _, link in kept),
            flops_per_s=self.attention_flops_per_s,
            call_s=self.call_s,
            merge_s=self.merge_s,
            copy_s=self.copy_s,
        )


def load_hardware(name: str, *, inter_node: str | None = None) -> Hardware:
    """Read a file of hardware/, by name or by path; `inter_node` names another link between nodes.

    Raises:
        ConfigError: no such file or link, or a figure that is missing, unknown, or without a
            source.
    """
    path = Path(name) if name.endswith(".yaml") else _files().get(name)
    if path is None:
        raise ConfigError(
            f"{name!r} is not a name in hardware/ ({', '.join(sorted(_files())) or 'none found'})"
        )
    content = _read(path)
    links: dict[str, Any] = {}
    for folder in (*reversed(bundled_folders("hardware")), path.parent):
        if (folder / "links.yaml").is_file():
            links |= _read(folder / "links.yaml")
    links |= content.pop("links", {})
    if inter_node is not None:
        content["inter_node"] = inter_node
    outer = str(content.get("inter_node"))
    for key in ("intra_node", "inter_node"):
        content[key] = _link(links, content.get(key), f"{path}: {key}")
    _check_sources(content, str(path))
    content |= {key: float(links[outer][key]) for key in _OF_LINKS if key in links[outer]}
    known = {field.name for field in dataclasses.fields(Hardware)} - {"name"}
    if not known - set(_MEASURED) <= content.keys() <= known:
        raise ConfigError(
            f"{path}: missing {sorted(known - set(_MEASURED) - content.keys()) or 'nothing'}, "
            f"unknown {sorted(content.keys() - known) or 'nothing'}"
        )
    return Hardware(name=path.stem, **content)


def hardware_names() -> list[str]:
    return sorted(_files())


def _files() -> dict[str, Path]:
    """Name -> file, from ./hardware and then from the package."""
    files: dict[str, Path] = {}
    for folder in bundled_folders("hardware"):
        for path in sorted(folder.glob("*.yaml")):
            if path.stem != "links":
                files.setdefault(path.stem, path)
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, found {content!r}")
    return content


def _link(links: Mapping[str, Any], name: object, where: str) -> Link:
    if name not in links:
        raise ConfigError(f"{where}: {name!r} is not a link ({', '.join(sorted(links))})")
    figures = dict(links[str(name)])
    _check_sources(figures, f"link {name}")
    try:
        return Link(
            latency_s=float(figures["latency_s"]),
            bytes_per_s=float(figures["nominal_bytes_per_s"]) * float(figures["efficiency"]),
        )
    except KeyError as error:
        raise ConfigError(f"link {name}: needs {error.args[0]}") from None


def _check_sources(figures: dict[str, Any], where: str) -> None:
    """Take `sources` out of the figures; every number must have one."""
    sources = figures.pop("sources", {})
    numbers = {key for key, value in figures.items() if isinstance(value, float | int)}
    if lacking := sorted(key for key in numbers if not sources.get(key)):
        raise ConfigError(f"{where}: no source for {', '.join(lacking)}")
