"""Print docs/structure.md: the layers, and one line per module taken from its docstring.

python tools/structure.py > docs/structure.md       (a test checks that the file is current)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Structure

Made by `python tools/structure.py > docs/structure.md` from the first sentence of each module; do
not edit.

![Architecture](_static/architecture.svg)

Data takes one way through a step, and every arrow is a plain value:

```
file, HTTP, Python   Request                                            RequestOutput
                        |                                                     ^
rank 0               RequestLedger.add                              text.OutputProcessor
                        |                                                     ^
                     SequenceStates.waiting                                   |
                        |                                                     |
                     Scheduler.plan -> StepPlan                      Scheduler.commit
                                          | broadcast                         ^
every rank           worker.batching: tokens, positions, attention       StepOutput
                        |                                                     ^
                     GPTModel -> attention.step: RoPE, write K and V -> transport or decode
                                    -> kernels, comm -> worker.sampling: top-k, top-p, seeds
```

A module imports from the layers below it only (`make lint` checks):

| layer, from the top | what is in it | may use |
|---|---|---|
| commands | `cli` | everything below |
| edge | `serving` | the engine |
| engine | `engine`, with `startup` and `disaggregated` | everything below |
| work of a rank | `worker`: plans to tensors, sampling | model, attention |
| text | `text`: tokenizer, chat templates, stop strings | data, tokenizers; no torch |
| model | `mcore` | megatron-core, here only |
| checkpoints | `checkpoint` | safetensors |
| plans | `scheduler` | cache ledger, the count of causal pairs, data; no torch |
| attention | `attention`: `csa` `layout` `levels` `pipeline` `planner` `transports` | the floor |
| floor | `comm`, `kernels`, `kv_cache` | sockets and torch.distributed; Triton; torch |
| ranks | `parallel` | torch in `groups` only |
| data | `config` `errors` `logprobs` `metrics` `outputs` `types` | the standard library |
| beside them | `simulator` | the scheduler and attention's formulas; no torch |

Beside the package: `tools/` has what people call, thin over the same functions; `benchmarks/`
measures, evaluates, simulates and trains; `launch/` starts jobs under launchers and services;
`model_configs/` names models; `hardware/` and `traces/` are read by the simulator; `docs/` is this
site, and `docs/results/` keeps what was measured. `tests/` mirrors the package: `unit` and
`kernels` in one process, `dist` on ranks that stay alive for a whole session (`harness.py`), `e2e`
through the launchers, `histories` (long random ones), `serving`, `commands` and `benchmarks` in one
process each, `docs` for this site.
"""


def first_sentence(path: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def markdown() -> str:
    """Text of the whole page."""
    lines = [HEAD]
    package = ROOT / "sps2_mega"
    folders = [package, *sorted(p for p in package.rglob("*") if p.is_dir())]
    for folder in folders:
        files = [path for path in sorted(folder.glob("*.py")) if path.read_text().strip()]
        if files:
            lines += [
                f"## {folder.relative_to(ROOT)}",
                "",
                "| module | what it does |",
                "|---|---|",
            ]
            lines += [f"| `{path.name}` | {first_sentence(path)} |" for path in files]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
