"""Load of a folder's weights into one TP rank's parameters, by the checkout on PYTHONPATH.

    python child.py FOLDER MODEL TP_RANK TP

Prints JSON: seconds, bytes of the parameters, peak of resident memory above what was there before
the parameters, and a sum over all bits, which is the same for every right reader.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.model_file import named_model_file
from sps2_mega.checkpoint.sharding import local_shapes
from sps2_mega.checkpoint.source import open_checkpoint


def main() -> None:
    folder, model, rank, tp = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config = named_model_file(model).config
    dtype = getattr(torch, config.dtype)
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = memory("VmRSS")
    parameters = {
        name: torch.zeros(shape, dtype=dtype).fill_(1)
        for name, shape in local_shapes(config, tp).items()
    }
    began = time.perf_counter()
    source = open_checkpoint(folder, config)
    load_weights(parameters, source, config, tp_rank=rank, tp=tp)
    seconds = time.perf_counter() - began
    peak = memory("VmHWM") - before
    total = sum(int(p.view(torch.int16).sum(dtype=torch.int64)) for p in parameters.values())
    size = sum(p.nbytes for p in parameters.values())
    print(json.dumps({"seconds": seconds, "bytes": size, "peak_bytes": peak, "sum": total}))


def memory(name: str) -> int:
    """Bytes of this process that the kernel tells under a name: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kib)


if __name__ == "__main__":
    main()
