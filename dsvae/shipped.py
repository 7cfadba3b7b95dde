"""What comes with dsvae besides its modules, and the start of a run from an
installation."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dsvae.files import make_place, whole_directory

PACKAGE = Path(__file__).parent
FOLDERS = ("ds_configs", "slurm")


def shipped(folder: str) -> Path:
    """Returns one of `FOLDERS`: inside the package of a wheel, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def ds_configs() -> dict[str, Path]:
    """Returns the shipped DeepSpeed configurations by their names."""
    return {path.stem: path for path in sorted(shipped("ds_configs").glob("*.json"))}


def launch(launcher: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Becomes DeepSpeed's launcher, with its flags and those of train.py."""
    sys.stdout.flush()
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher]
    os.execv(sys.executable, [*runner, str(PACKAGE / "train.py"), *arguments])


def write_slurm(output: str) -> Path:
    """Writes the SLURM scripts and the DeepSpeed configurations, to edit, beside a link to
    the package; returns the directory.

    Raises:
        UserError: files are there already, or no right to write.
    """
    directory = Path(output).expanduser().absolute()
    make_place(directory)
    with whole_directory(directory) as temporary:
        for folder in FOLDERS:
            shutil.copytree(shipped(folder), temporary / folder)
        (temporary / "dsvae").symlink_to(PACKAGE.resolve())
    return directory
