"""Import path, seeds, markers with their skip conditions, order, and the end of the pools."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
for entry in (TESTS, TESTS.parent):
    if str(entry) not in sys.path:
        sys.path.insert(0, str(entry))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; ranks share the cores among them
# A job of one rank takes all cores. Threads that spin while they wait for each other would keep
# other tests from them: the same answers took seven times the CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The suite starts hundreds of processes, which would all compile every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.disable()  # while imports make objects that stay; see `pytest_collection_finish`


import harness  # noqa: E402  (needs the path set above)
import leftovers  # noqa: E402
import netns  # noqa: E402

if not harness.nvidia_driver():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: its kernels then run on the CPU

MARKERS = {
    "gpu": "needs a CUDA device",
    "netns": "builds network namespaces: needs root and iproute2 (ip, tc)",
    "slow": "takes more than about 20 s",
    "exhaustive": "hundreds of drawn cases, of which the suite has a short form; asked for by name",
}


# The machine may be busy: a slow example is no failure.
hypothesis.settings.register_profile("busy-machine", deadline=None)
hypothesis.settings.load_profile("busy-machine")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


# Folders in the order in which their files start: what takes long first, so that no worker has a
# long file left when the others are done.
ORDER = ("e2e", "dist", "serving", "benchmarks", "histories", "commands", "simulator", "kernels")
# Longest files of a folder, longest first.
LONG_FILES = (
    "test_dead_rank", "test_cluster_bench", "test_serve", "test_serve_ends", "test_generate_cli",
    "test_equals_transformers", "test_levels", "test_prefix_caching", "test_launchers",
    "test_engine", "test_http_robust", "test_eval_accuracy",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" not in config.getoption("-m"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: start_order(item.path))
    reasons = {"gpu": missing_gpu, "netns": missing_netns}
    for marker, missing in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def start_order(path: Path) -> tuple[int, int]:
    """Ascending where tests of this file run earlier than others; files of equal order stay."""
    folder = path.relative_to(TESTS).parts[0]
    long = LONG_FILES.index(path.stem) if path.stem in LONG_FILES else len(LONG_FILES)
    return ORDER.index(folder) if folder in ORDER else len(ORDER), long


def missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def missing_netns() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if tools:
        return f"not installed: {', '.join(tools)} (package iproute2)"
    try:
        with netns.two_nodes():
            return None
    except RuntimeError as error:  # root in a container often lacks the capability
        return f"cannot build network namespaces: {error}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level tokenizer."""
    import tokenizer_samples as samples

    from sps2_mega.text.tokenizer import Tokenizer

    return Tokenizer.load(samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One folder for all workers of a session: the machine is measured once per layout."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    harness.cache_home.append(shared / "cache")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A test that leaves a signal handler, a process or a thread fails."""
    before = leftovers.Before()
    yield
    found = before.leftovers()
    assert not found, f"left behind: {found}"


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_sessionfinish() -> None:
    harness.close_pools()
