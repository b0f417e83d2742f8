"""Prints docs/structure.md: the layers, and one line per module taken from its docstring.

python tools/structure.py > docs/structure.md       (a test checks that the file is current)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Structure

Made by `python tools/structure.py > docs/structure.md` from the first sentence of each module; do not edit.

Data goes one way through a step, and every arrow is a plain value:

```
file, Python      Request                                                     RequestOutput
                     |                                                              ^
rank 0            Scheduler.plan -> StepPlan -> broadcast         Scheduler.commit, OutputProcessor
                                                    |                               ^
every rank        batching: tokens, positions, attention of the step          StepOutput
                     |                                                              ^
                  GPTModel -> core_attention -> transport or decode -> kernels, comm -> sampler
```

A module imports from the layers above it only (`make lint` checks):

| layer | what | may use |
|---|---|---|
| data | `errors` `types` `config` `metrics` `flags` | the standard library |
| plans | `parallel.topology` `parallel.launcher` `attention.layout` `kv_cache` (but `pool`) `engine.scheduler` `engine.admission` `engine.seeds` | data; no torch |
| tensors | `kernels` `kv_cache.pool` `engine.sampler` | torch; `kernels` import nothing of ours |
| wires | `parallel.groups` `comm` | torch.distributed, sockets |
| algorithms | `attention` | all above |
| model | `mcore` `checkpoint` | megatron-core (in `mcore` only), safetensors |
| engine | `engine` | all above |
| edge | `serving` `cli` | the engine |
| beside it | `simulator` | the scheduler and formulas of `attention`; no torch |

Beside the package: `launch/` starts jobs (`launch/README.md`), `model_configs/` names models, `tools/` converts and
inspects checkpoints, looks at the machine (`doctor.py`) and measures (`bench/`), `docs/results/` keeps what was measured. `hardware/` and
`traces/` are what the simulator reads.
`tests/` mirrors the package: `unit` and `kernels` in one process, `dist` on ranks that stay alive for a whole
session (`harness.py`), `e2e` through the launchers.
"""


def first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def markdown() -> str:
    """The whole file."""
    lines = [HEAD]
    package = ROOT / "sps2_mega"
    folders = [package, *sorted(p for p in package.rglob("*") if p.is_dir())]
    for folder in folders:
        files = [path for path in sorted(folder.glob("*.py")) if path.read_text().strip()]
        if files:
            lines += [f"## {folder.relative_to(ROOT)}", "", "| module | what it is |", "|---|---|"]
            lines += [f"| `{path.name}` | {first_sentence(path)} |" for path in files]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
