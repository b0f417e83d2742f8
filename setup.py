"""The wheel's only peculiarity: folders beside the package travel inside it. All else is in
pyproject.toml."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PLACES = runpy.run_path(str(HERE / "sps2_mega" / "bundled.py"))  # importing the package needs torch


class BuildWithFiles(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # they are found beside the package
        for name in PLACES["FOLDERS"]:
            target = Path(self.build_lib) / "sps2_mega" / PLACES["INSIDE"] / name
            shutil.copytree(HERE / name, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFiles})
