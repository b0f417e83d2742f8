"""One rank of a pool: receives (module, function, arguments), calls the function, sends back what
it returned.

Runs in a process of its own, forked for `harness.RankPool`. It decides nothing about distribution:
RANK, WORLD_SIZE and the others are given by the pool, and `torch.distributed` is initialised only
if the called function does so. Imports stay from one call to the next, process groups do not.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1


def main(connection: Connection, environment: dict[str, str], log: str) -> None:
    """`log` is a file that takes what the process writes."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    # A pytest that is killed takes the server of forks along, and it the ranks, even ones that are
    # stuck in a collective.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        return
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    serve(connection, rank=int(environment["RANK"]))


def serve(connection: Connection, *, rank: int) -> None:
    """Answers calls until the parent closes its end. Every answer is (status, value)."""
    while True:
        try:
            header = pickle.loads(connection.recv_bytes())
            arguments = connection.recv_bytes()
        except EOFError:
            return
        reply = call(rank, header, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(reply)


def call(rank: int, header: dict[str, Any], arguments: bytes) -> bytes:
    frozen = gc.get_freeze_count()
    try:
        function = find_function(header)
        args, kwargs = pickle.loads(arguments)  # after the import: arguments may use its classes
        seed_everything(header["seed"])
        return pickle.dumps(("ok", function(rank, *args, **kwargs)))
    except KeyboardInterrupt:
        raise
    # SystemExit and pytest's Skipped and Failed are answers too.
    except BaseException as error:  # noqa: BLE001
        return pickle.dumps(("error", (type(error).__name__, traceback.format_exc())))
    finally:
        leave_groups(frozen)


def leave_groups(frozen: int) -> None:
    """Destroy the process groups that a test left behind; `frozen` objects were exempted from
    garbage collection before it."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
    # Groups are parts of reference cycles, and their threads live, and wake up, as long as they do.
    if gc.get_freeze_count() != frozen:
        gc.unfreeze()  # a worker has exempted its objects from collection
        gc.collect()
        gc.freeze()
    else:
        gc.collect()


def find_function(header: dict[str, Any]) -> Callable[..., Any]:
    for entry in header["sys_path"]:
        if entry not in sys.path:
            sys.path.append(entry)
    found: Any = load_module(header["module"], header["file"])
    for name in header["qualname"].split("."):
        found = getattr(found, name)
    return found


def load_module(name: str, file: str) -> ModuleType:
    """By file, because how pytest names test modules depends on its import mode."""
    module = sys.modules.get(name)
    if module is not None and same_file(module, file):
        return module
    package = name.rpartition(".")[0]
    if package and (Path(file).parent / "__init__.py").exists():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def same_file(module: ModuleType, file: str) -> bool:
    return os.path.realpath(getattr(module, "__file__", None) or "") == os.path.realpath(file)


def seed_everything(seed: int) -> None:
    """Seed every library that is imported, so that calls do not depend on earlier ones."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
