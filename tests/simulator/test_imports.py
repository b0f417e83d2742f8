"""The simulator runs where no deep-learning library is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = [path.stem for path in (ROOT / "sps2_mega" / "simulator").glob("[a-z]*.py")]


def test_no_simulator_module_loads_torch():
    names = ", ".join(f"sps2_mega.simulator.{name}" for name in MODULES)
    code = (
        f"import sys, {names}, tools.simulate, tools.plan\n"
        "heavy = [n for n in ('torch', 'megatron', 'transformers', 'matplotlib') if n in "
        "sys.modules]\n"
        "sys.exit('loaded: ' + ', '.join(heavy) if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(MODULES) > 10
