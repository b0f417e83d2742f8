"""The Python interface with the bundled model: one process, own ranks, a launcher's ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PROGRAM = """
import json, sys
from sps2_mega.serving import LLM, SamplingParams

greedy = SamplingParams(max_tokens=12, temperature=0)
with LLM("sps2-tiny", sp=int(sys.argv[1]), dtype="float32", num_blocks=300) as llm:
    outputs = llm.generate(["import os\\nimport ", [256, 100, 101, 102], "x" * 5000], greedy)
    again = llm.generate("def f(a):", [greedy.replace(n=2, temperature=1.0, seed=5)])
    chat = llm.chat([{"role": "user", "content": "hi"}], greedy)
    print(json.dumps({
        "ids": [output.request_id for output in outputs],
        "texts": [[c.text for c in output.completions] for output in outputs + again + chat],
        "errors": [output.error for output in outputs],
    }))
llm.close()
"""
WAITING = """
import os, time
from sps2_mega.serving import LLM

llm = LLM("sps2-tiny", sp=2, num_blocks=50)
print("pids", os.getpid(), *llm._driver.ranks.pids, flush=True)
time.sleep(120)
"""
# A rank lost before ranks have met, a damaged file, a rank lost in a call; then nothing is left.
FAILING = """
import json, os, signal, sys, tempfile, threading, time
import psutil
from sps2_mega.errors import CheckpointError, RankFailure
from sps2_mega.serving import LLM, SamplingParams

def state():
    children = [process.pid for process in psutil.Process().children()]
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    files = sorted(os.listdir("/proc/self/fd")), sorted(os.listdir(tempfile.gettempdir()))
    return children, handlers, threading.active_count(), files

def tell(function, *args, **options):
    try:
        function(*args, **options)
    except (CheckpointError, RankFailure) as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)

def kill_last():
    while len(children := psutil.Process().children()) < 2:
        time.sleep(0.01)
    max(children, key=lambda child: child.pid).kill()

os.mkdir("tmp")
tempfile.tempdir = os.environ["TMPDIR"] = os.path.abspath("tmp")
before = state()
killer = threading.Thread(target=kill_last)
killer.start()
tell(LLM, "sps2-tiny", sp=2)
killer.join()
tell(LLM, sys.argv[1], sp=2)
with LLM("sps2-tiny", sp=2, num_blocks=300) as llm:
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].error is None
    os.kill(llm._driver.ranks.pids[1], signal.SIGKILL)
    tell(llm.generate, "a", SamplingParams(max_tokens=300))
    tell(llm.generate, "a")
print(json.dumps(state() == before or repr((before, state()))))
"""
ORPHAN_SECONDS = 15.0


def environment() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ranks}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def run(folder: Path, sp: int, *, launcher: list[str] | None = None) -> dict:
    script = folder / "program.py"
    script.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, *(launcher or []), str(script), str(sp)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Exactly one rank gets past the constructor.
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run(tmp_path_factory.mktemp("one"), 1)


def test_outputs_come_in_order_with_refusals_in_place(one_process: dict) -> None:
    assert one_process["ids"] == ["0", "1", "2"]
    assert one_process["errors"][:2] == [None, None]
    assert "5001 tokens" in one_process["errors"][2]
    assert [len(texts) for texts in one_process["texts"]] == [1, 1, 0, 2, 1]
    assert len(set(one_process["texts"][3])) == 2


def test_ranks_of_its_own_answer_the_same(one_process: dict, tmp_path: Path) -> None:
    assert run(tmp_path, 2) == one_process


def test_ranks_of_a_launcher_answer_the_same(one_process: dict, tmp_path: Path) -> None:
    assert run(tmp_path, 2, launcher=TORCHRUN) == one_process


@pytest.fixture
def waiting(tmp_path: Path):
    """A program with a rank of its own that has loaded and does nothing more."""
    (tmp_path / "program.py").write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = next((line for line in process.stdout if line.startswith("pids")), "")
    pids = [int(text) for text in re.findall(r"\d+", line)]
    yield process, pids
    for pid in {process.pid, *pids}:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_ranks_end_with_a_parent_that_is_killed(waiting) -> None:
    process, pids = waiting
    assert len(pids) == 3
    process.kill()
    process.wait()
    assert all_gone(pids)


def test_errors_of_ranks_reach_the_program_which_goes_on(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_configs" / "sps2-tiny", tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size - 4)
    (tmp_path / "program.py").write_text(FAILING)
    result = subprocess.run(
        [sys.executable, "program.py", "cut"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    at_start, damaged, running, after, clean = map(json.loads, result.stdout.splitlines())
    assert at_start[0] == "RankFailure" and "rank 1 (pid" in at_start[1] and "-9" in at_start[1]
    assert damaged[0] == "CheckpointError" and "cut" in damaged[1]
    assert running[0] == "RankFailure" and "rank 1" in running[1] and "died" in running[1]
    assert after[0] == "RankFailure" and "make another one" in after[1]
    assert clean is True
    assert "Traceback" not in result.stderr


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))
