"""The help of the training command."""

import subprocess
import sys

from launch import TRAIN, environment

from dsvae.config import ALIASES, RECIPES, field_types
from dsvae.usage import help_text


def test_help_names_every_flag_with_its_default_and_says_what_it_is():
    text = help_text()
    lines = text.splitlines()
    for name in (*field_types(), *(f"{alias}" for alias in ALIASES)):
        assert f"--{name} " in text or f"--{name}," in text, name
    for at, line in enumerate(lines):
        if line.startswith("--"):
            assert lines[at + 1].startswith("    "), line
    assert "--model.name, --model  str; default None" in text
    assert "--phase2.free_bits  float at least 0; default 0.0\n    KL threshold in nats" in text
    assert (
        "--model.pooling, --pooling  mean|max|first|attention|chunks|queries; default mean" in text
    )
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert ", ".join(recipes) in " ".join(text.split())


def test_the_command_prints_it_and_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, TRAIN, "--help"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (0, [])
    assert help_text() in done.stdout
    assert "--data.weights  list of float positive; default []" in done.stdout
    assert "<" not in done.stdout.split("--ds_config  ")[1]  # no object of Python
