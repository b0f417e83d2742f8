"""launch/slurm.sbatch with stand-ins for `srun` and `scontrol`: two loopback "nodes"."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from generation_job import generate_command, texts_of, write_requests
from launched import ROOT, launched

# One task per node, as `srun` without options makes them; ends the others when one fails, and
# passes SIGTERM on.
SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do
    SLURM_PROCID=$task "$@" &
    pids+=($!)
done
trap 'interrupted=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM
code=0
for pid in "${pids[@]}"; do
    interrupted=1
    while [[ -n $interrupted ]]; do
        interrupted=
        wait "$pid" && one=0 || one=$?
    done
    if [[ $one -ne 0 && $code -eq 0 ]]; then
        code=$one
        kill -TERM "${pids[@]}" 2>/dev/null
    fi
done
exit "$code"
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") printf '127.0.0.1\n127.0.0.1\n' ;;
requeue*) echo "requeued $2" ;;
*) exit 9 ;;
esac
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch script with two nodes of one rank."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    python = Path(sys.executable).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "PATH": f"{folder}:{python}:/usr/bin:/bin:/usr/sbin:/sbin",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "RANKS": "1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture
def quick(slurm, tmp_path) -> dict[str, str]:
    """The script alone, without the launcher below it, which costs seconds."""
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "torchrun.sh"
    script.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return {**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)}


def batch(*program: str) -> list[str]:
    return ["bash", str(ROOT / "launch" / "slurm.sbatch"), *program]


def test_two_nodes_answer_as_one_rank_does(tmp_path, slurm):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = write_requests(requests, 3, 6)
    program = generate_command(requests, answers, sp=2)
    with launched(batch(*program), tmp_path / "log", **slurm) as job:
        assert job.main.wait(120) == 0, job.output()
        assert "rank 0 is on 127.0.0.1" in job.output()
    assert "requeued" not in job.output()
    assert sorted(texts_of(answers)) == sorted(ids)


def test_a_failed_job_goes_back_into_the_queue_a_few_times(tmp_path, quick):
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit(3)\n")
    for restarts, expected in (("1", True), ("5", False)):
        with launched(
            batch(str(program)), tmp_path / "log", **quick, SLURM_RESTART_COUNT=restarts
        ) as job:
            assert job.main.wait(60) == 3
        assert ("requeued 4711" in job.output()) is expected, job.output()


def test_a_signal_reaches_the_ranks_and_the_job_stays_ended(tmp_path, quick):
    program = tmp_path / "waits.py"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(7)))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(60)\n"
    )
    with launched(batch(str(program)), tmp_path / "log", **quick) as job:
        job.wait_until(lambda: job.output().count("waiting") == 2, 60)
        job.send(job.main.pid, signal.SIGTERM)
        assert job.wait_end(20) == 7
    assert job.output().count("told") == 2
    assert "requeued" not in job.output()


def test_what_is_missing_is_said(slurm):
    without = {name: value for name, value in slurm.items() if name != "RANKS"}
    for command, environment, words in (
        (batch(), slurm, "usage"),
        (batch("x.py"), without, "set RANKS"),
    ):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
        assert ran.returncode != 0 and words in ran.stderr
