"""Puts the folders that a checkout has beside the package into the package of a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("ds_configs", "slurm"):
                shutil.copytree(folder, Path(self.build_lib, "dsvae", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPy})
