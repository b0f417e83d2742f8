"""Examples of launch/ as far as they run without a cluster: read by their real readers."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizer_samples as samples
import yaml
from fake_engine import FakeEngine
from fake_server import serving

from sps2_mega.cli.serve import serve_parser
from sps2_mega.serving.http.settings import ServerConfig
from sps2_mega.text.tokenizer import Tokenizer

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DRAIN_S = ServerConfig().drain_timeout


def kubernetes() -> dict[tuple[str, str], dict[str, Any]]:
    documents = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def container() -> dict[str, Any]:
    [only] = kubernetes()["StatefulSet", "sps2-mega"]["spec"]["template"]["spec"]["containers"]
    return only


def serve_commands() -> dict[str, str]:
    """The arguments of launch/serve.py in each example."""
    texts = {
        "slurm": (LAUNCH / "slurm.sbatch").read_text(),
        "systemd": (LAUNCH / "sps2_mega.service").read_text(),
        "kubernetes": container()["command"][2],
    }
    found = {name: re.search(r"launch/serve\.py (.+)", text) for name, text in texts.items()}
    assert all(found.values())
    return {name: match[1] for name, match in found.items() if match}


@pytest.mark.parametrize("name", ["slurm", "systemd", "kubernetes"])
def test_flags_of_the_examples_are_ours(name):
    command = serve_commands()[name].replace("${TP}", "2").replace("${SP}", "4")
    parsed = vars(serve_parser().parse_args(shlex.split(command)))
    assert (parsed["host"], parsed["port"]) == ("0.0.0.0", 8000)
    assert (parsed["parallel.tp"], parsed["parallel.sp"]) in [(2, 4), (4, 4)]


def test_shell_scripts_are_sound():
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    assert len(scripts) >= 3
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)


def test_the_hostfile_is_read_by_deepspeed_as_two_nodes():
    pytest.importorskip("deepspeed")
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(LAUNCH / "hostfile.example"))) == {
        "10.0.0.1": 8,
        "10.0.0.2": 8,
    }


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    text = (LAUNCH / "sps2_mega.service").read_text()
    unit = tmp_path / "sps2_mega.service"
    unit.write_text(text.replace("/opt/sps2_mega/.venv/bin/python", sys.executable))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    ours = [line for line in checked.stderr.splitlines() if "sps2_mega" in line]
    assert (checked.returncode, ours) == (0, []), checked.stderr


def test_the_unit_stops_after_the_drain_and_not_for_a_bad_configuration():
    fields = re.findall(r"^(\w+)=(.*)$", (LAUNCH / "sps2_mega.service").read_text(), re.M)
    unit = dict(fields)
    assert float(unit["TimeoutStopSec"]) > DRAIN_S + 10
    assert (unit["Restart"], unit["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert unit["KillMode"] == "mixed", "rank 0 ends the others"


def test_kubernetes_names_fit_together():
    found = kubernetes()
    workload = found["StatefulSet", "sps2-mega"]["spec"]
    labels = workload["template"]["metadata"]["labels"]
    ranks, clients = (
        found["Service", "sps2-mega-ranks"]["spec"],
        found["Service", "sps2-mega"]["spec"],
    )
    assert workload["selector"]["matchLabels"] == labels == ranks["selector"]
    assert clients["selector"] == {**labels, "apps.kubernetes.io/pod-index": "0"}
    assert ranks["clusterIP"] == "None" and ranks["publishNotReadyAddresses"] is True
    assert workload["serviceName"] == "sps2-mega-ranks"
    assert workload["podManagementPolicy"] == "Parallel"
    pod, main = workload["template"]["spec"], container()
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S + 10
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in main["volumeMounts"]} == volumes
    variables = {each["name"]: each.get("value") for each in main["env"]}
    assert variables["MASTER_ADDR"] == "sps2-mega-0.sps2-mega-ranks"
    assert [port["port"] for port in ranks["ports"]] == [int(variables["MASTER_PORT"])]
    assert clients["ports"][0]["targetPort"] == main["ports"][0]["name"]
    parsed = vars(serve_parser().parse_args(shlex.split(serve_commands()["kubernetes"])))
    assert main["ports"][0]["containerPort"] == parsed["port"]
    nodes, per_node = int(variables["NODES"]), int(variables["RANKS"])
    assert (
        nodes == workload["replicas"] and per_node == main["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert nodes * per_node == parsed["parallel.tp"] * parsed["parallel.sp"]


@pytest.mark.parametrize("pod", [0, 1])
def test_each_pod_becomes_its_node(tmp_path, pod):
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "torchrun.sh"
    script.write_text('#!/bin/sh\necho "$NODE_RANK $*"\n')
    script.chmod(0o755)
    ran = subprocess.run(
        container()["command"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOSTNAME": f"sps2-mega-{pod}"},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert ran.stdout.split()[:2] == [str(pod), "launch/serve.py"], ran.stderr


def test_probes_ask_what_the_server_answers(tmp_path):
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    with serving(FakeEngine(tokenizer), ready=False, api_key="secret") as server:

        def probe(name: str, pod: int) -> bool:
            command = container()[f"{name}Probe"]["exec"]["command"]
            at_server = [part.replace("http://127.0.0.1:8000", server.url) for part in command]
            assert at_server != command
            path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
            environment = {"PATH": path, "HOSTNAME": f"sps2-mega-{pod}"}
            ran = subprocess.run(at_server, env=environment, stderr=subprocess.DEVNULL, timeout=20)
            return ran.returncode == 0

        assert (probe("liveness", 0), probe("readiness", 0)) == (True, False), "while loading"
        assert (probe("liveness", 1), probe("readiness", 1)) == (True, True)
        server.async_engine.fail_soon("rank 1 died")
        assert (probe("liveness", 0), probe("readiness", 0)) == (False, False)
