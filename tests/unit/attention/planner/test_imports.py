"""The planner chooses on ints: it loads no tensor library, and nothing of engine or worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
MODULES = [path.stem for path in (ROOT / "sps2_mega" / "attention" / "planner").glob("[a-z]*.py")]


def test_no_planner_module_loads_torch_or_the_engine():
    names = ", ".join(f"sps2_mega.attention.planner.{name}" for name in MODULES)
    code = (
        f"import sys, {names}\n"
        "above = ('torch', 'megatron', 'sps2_mega.engine', 'sps2_mega.worker', 'sps2_mega.comm')\n"
        "loaded = [n for n in above if n in sys.modules]\n"
        "sys.exit('loaded: ' + ', '.join(loaded) if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(MODULES) >= 8
