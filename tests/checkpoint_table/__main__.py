"""Write the table of docs/checkpoints.md from checkpoints that megatron-core's releases write now.

    make checkpoint-table
    python tests/checkpoint_table [--releases 0.16.1 0.19.2] [--keep DIR] [--no-page]

For every release a child process with it in front of PYTHONPATH writes one folder per format and
parallel shape; the installed megatron-core reads them all. Ends with 1 where a folder was not read
or refused as it has to be. The page is written by a run of all releases without failures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:1] = [str(TESTS), str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from checkpoint_table import cells, page  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--releases", nargs="+", default=list(cells.RELEASES), metavar="VERSION")
    keep = "write the folders there, but for releases that an earlier call wrote whole"
    parser.add_argument("--keep", type=Path, metavar="DIR", help=keep)
    parser.add_argument("--no-page", action="store_true", help="leave docs/checkpoints.md alone")
    options = parser.parse_args()
    no_page = options.no_page or tuple(options.releases) != cells.RELEASES
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        roots = {release: folder / release for release in options.releases}
        for release, root in roots.items():
            since = time.monotonic()
            if not (root / "release.txt").is_file():
                write(release, root)
            print(f"{release}: written in {time.monotonic() - since:.0f} s", flush=True)
        since = time.monotonic()
        return read(roots, Path(scratch) / "huggingface", no_page, since)


def write(release: str, root: Path) -> None:
    """Let a child with that release write its folders."""
    paths = [str(installed(release)), str(TESTS), str(ROOT)]
    subprocess.run(
        [sys.executable, "-m", "checkpoint_table.write", str(root)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        check=True,
    )
    found = (root / "release.txt").read_text()
    if found != release:
        raise SystemExit(f"megatron-core {release} was asked for, {found} ran")


def installed(release: str) -> Path:
    """Folder with that release of megatron-core alone, where `make test-megatron` has it too."""
    folder = ROOT / ".megatron" / release
    if not (folder / ".installed").is_file():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
             "--ignore-requires-python", "--upgrade", "--target", str(folder),
             f"megatron-core=={release}"],
            check=True,
        )  # fmt: skip
        (folder / ".installed").touch()
    return folder


def read(roots: dict[str, Path], scratch: Path, no_page: bool, since: float) -> int:
    import harness

    from checkpoint_table.read import outcomes

    found = outcomes(roots, scratch)
    harness.close_pools()
    failures = [(*key, outcome.failure) for key, outcome in found.items() if outcome.failure]
    for release, place, failure in failures:
        print(f"{release} {place}: {failure}")
    lines = page.rows(found, list(roots))
    print("\n".join(lines))
    took = time.monotonic() - since
    print(f"{len(found)} folders read in {took:.0f} s, {len(failures)} failures")
    if not no_page and not failures:
        page.PAGE.write_text(page.with_table(page.PAGE.read_text(), lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
