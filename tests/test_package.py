"""The wheel: what it holds, and the README's first steps from it where no checkout is."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version

import pytest
import yaml
from launch import ROOT, TINY, environment, free_port

pytest.importorskip("build")
pytest.importorskip("twine")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The wheel, made from the sdist, and the sdist; of a checkout with runs in it."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*.egg-info", "runs")
    shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=ignored)
    (source / "runs" / "x").mkdir(parents=True)
    (source / "runs" / "x" / "metrics.json").write_text("{}")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", str(source)],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=300,
    )
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def fresh(dist, tmp_path_factory):
    """Runs a command line in an environment that has dsvae from the wheel; everything
    else is that of the tests."""
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    (packages,) = (place / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    python = str(place / "venv" / "bin" / "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, *install, str(dist[0])], check=True, timeout=300)
    path = f"{place / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def run(line, cwd=place, code=0):
        done = subprocess.run(
            shlex.split(line),
            cwd=cwd,
            env=environment(PATH=path, PYTHONPATH="", DSVAE_HOST_PYTHON=python),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout if code == 0 else done.stderr

    run.place = place
    return run


def test_wheel_and_sdist_hold_the_package_alone(dist):
    wheel, sdist = dist
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, inner in (
        ("dsvae", "dsvae"),
        ("ds_configs", "dsvae/ds_configs"),
        ("slurm", "dsvae/slurm"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{inner}/{path.relative_to(ROOT / folder)}" in inside, path
    tops = {name.split("/")[0] for name in inside}
    assert tops == {"dsvae", f"dsvae-{version('dsvae')}.dist-info"}
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "CITATION.cff", "setup.py", "slurm/train.sbatch"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "runs", "build")]


def test_the_index_would_take_them(dist):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist)]
    subprocess.run(command, check=True, timeout=300)


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == version("dsvae")


def test_first_steps(fresh):
    """Train by names alone, sample, and write the scripts of a cluster."""
    where = fresh("python -c 'import dsvae; print(dsvae.__file__)'").strip()
    assert where.startswith(str(fresh.place))
    assert fresh("dsvae --version") == f"dsvae {version('dsvae')}\n"
    (fresh.place / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (command,) = re.findall(
        r"dsvae train --ds_config zero2$", (ROOT / "README.md").read_text(), re.M
    )
    more = "--config tiny.yaml --precision fp32 --output_dir runs/tiny --data.cache_dir cache"
    shown = fresh(f"{command} --num_gpus 1 --master_port {free_port()} {more}")
    assert "metrics runs/tiny/metrics.json" in " ".join(shown.split())
    assert len(fresh("dsvae sample runs/tiny/model -n 3 --max_new_tokens 3").splitlines()) == 3


def test_scripts_of_a_cluster(fresh):
    made = fresh("dsvae slurm --output cluster").strip()
    assert made == str(fresh.place / "cluster")
    assert "already exists" in fresh("dsvae slurm --output cluster", code=2)
    site = fresh.place / "cluster" / "slurm" / "site.sh"
    assert site.read_text() == (ROOT / "slurm" / "site.sh").read_text()
    # A stand-in for sbatch: the snapshot that the job would run is whole.
    sbatch = fresh.place / "venv" / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" > submitted\necho 7\n')
    sbatch.chmod(0o755)
    assert fresh("cluster/slurm/submit.sh --config park2021 --output_dir runs/job") == "7\n"
    words = (fresh.place / "submitted").read_text().split()
    (code,) = (fresh.place / "runs" / "job" / "slurm").glob("submitted-*/code")
    assert f"{code}/slurm/train.sbatch" in words
    assert words[words.index("--ds_config") + 1] == f"{code}/ds_configs/zero2.json"
    assert (code / "dsvae" / "train.py").is_file()
    assert not (code / "dsvae").is_symlink()
