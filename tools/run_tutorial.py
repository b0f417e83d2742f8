"""Run a tutorial as its page says: every shell block in order, in one shell and an empty folder.

    python tools/run_tutorial.py docs/tutorials/two-nodes.md [TOKENS=4000 ...]

What counts on a page:

    ```bash                  is run; the first command that fails ends the run
    ```python                with a first line "# NAME.py" is saved as NAME.py
    <!-- expect: TEXT -->    TEXT must occur in the output of the shell block above it; how much
                             space is between words does not matter
    <!-- cleanup -->         the shell block below it is run at the end, whatever happened

Other blocks are for the reader. NAME=VALUE arguments become environment variables.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARK = "@@ block"
_FILE_NAME = re.compile(r"# (\w[\w.-]*\.py)$")
_EXPECT = re.compile(r"<!-- expect: (.*) -->$")


@dataclass(slots=True)
class Block:
    """One shell block, `line` of its page; `files` are saved before it runs."""

    line: int
    code: str
    cleanup: bool = False
    expected: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def blocks_of(page: str) -> list[Block]:
    """Shell blocks of a page in order.

    Raises:
        ValueError: an `expect` before any shell block, or a fence without an end.
    """
    blocks: list[Block] = []
    files: dict[str, str] = {}
    fence, code, start, cleanup = None, [], 0, False
    for number, line in enumerate(page.splitlines(), 1):
        if fence is None and line.startswith("```"):
            fence, code, start = line[3:].strip(), [], number
        elif fence is not None and line.startswith("```"):
            if fence == "bash":
                blocks.append(Block(start, "\n".join(code), cleanup, files=files))
                files, cleanup = {}, False
            elif fence == "python" and code and (name := _FILE_NAME.match(code[0])):
                files[name[1]] = "\n".join(code) + "\n"
            fence = None
        elif fence is not None:
            code.append(line)
        elif found := _EXPECT.match(line):
            if not blocks:
                raise ValueError(f"line {number} expects output before any shell block")
            blocks[-1].expected.append(found[1])
        elif line.strip() == "<!-- cleanup -->":
            cleanup = True
    if fence is not None:
        raise ValueError(f"the block of line {start} has no end")
    return blocks


def script_of(blocks: list[Block]) -> str:
    """One shell script; each block's output follows a line with the block's number."""
    cleanup = [block.code for block in blocks if block.cleanup]
    lines = ["set -euo pipefail"]
    if cleanup:
        lines += ["at_end() {", "set +e", *cleanup, "}", "trap at_end EXIT"]
    for number, block in enumerate(blocks):
        for name, content in block.files.items():
            lines += [f"cat > {name} <<'@@ end of file'", content.rstrip("\n"), "@@ end of file"]
        if not block.cleanup:
            lines += [f"echo '{_MARK} {number}'", block.code]
    return "\n".join(lines) + "\n"


def missing(blocks: list[Block], output: str) -> list[str]:
    """Expected texts that blocks did not print, one message each."""
    said: dict[int, str] = {}
    for part in output.split(_MARK)[1:]:
        number, _, text = part.partition("\n")
        said[int(number)] = " ".join(text.split())
    return [
        f"the block of line {block.line} should have said {words!r}"
        for number, block in enumerate(blocks)
        for words in block.expected
        if " ".join(words.split()) not in said.get(number, "")
    ]


def run(page: Path, variables: dict[str, str], timeout_s: float) -> tuple[int, str]:
    """Exit code of the page (1 also where an expected text is missing) and all that it said."""
    blocks = blocks_of(page.read_text())
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        folder = Path(name)
        (folder / "work").mkdir()
        script = folder / "script.sh"
        script.write_text(script_of(blocks))
        done = subprocess.run(
            ["bash", str(script)],
            cwd=folder / "work",
            env=os.environ | variables | _environment(folder / "bin"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    problems = missing(blocks, done.stdout) if done.returncode == 0 else []
    output = "\n".join([done.stdout, *problems])
    return done.returncode or int(bool(problems)), output


def _environment(programs: Path) -> dict[str, str]:
    """`sps2`, `python` and `torchrun` of this interpreter, with this checkout first on the path."""
    programs.mkdir()
    command = programs / "sps2"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sps2_mega.cli "$@"\n')
    command.chmod(0o755)
    path = [str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S")
    args = parser.parse_args(argv)
    variables = dict(text.split("=", 1) for text in args.variables)
    code, output = run(args.page, variables, args.timeout)
    print(output)
    return code


if __name__ == "__main__":
    sys.exit(main())
