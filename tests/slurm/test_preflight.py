"""Preflight on two nodes: all well, a node that cannot write, a node that is cut off, a
node without what SLURM promised."""

import re
import sys

import pytest

from dsvae.errors import EXIT_PREFLIGHT
from dsvae.parallel.preflight import odd_ones

NODES = ("--nodes=2", "--ntasks-per-node=2")
TOGETHER = """#!{python}
# In python's place: imports as it does, waits for the imports of EXPECTED ranks, and goes on as
# `python -m`. How long the ranks then wait for each other does not depend on a busy machine.
import os, runpy, sys, time
import dsvae.parallel.preflight
arrived = os.environ["ARRIVED"]
os.makedirs(arrived, exist_ok=True)
open(os.path.join(arrived, os.environ["RANK"]), "w").close()
while len(os.listdir(arrived)) < int(os.environ["EXPECTED"]):
    time.sleep(0.05)
assert sys.argv[1] == "-m"
del sys.modules["dsvae.parallel.preflight"], sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
FAILED = ("FAILED", f"{EXIT_PREFLIGHT}:0")


def together(tmp_path, ranks):
    """Variables with which a job's ranks begin their preflight at the same time."""
    path = tmp_path / "python"
    path.write_text(TOGETHER.format(python=sys.executable))
    path.chmod(0o755)
    arrived = str(tmp_path / "arrived")
    return {"DSVAE_PYTHON": str(path), "ARRIVED": arrived, "EXPECTED": str(ranks)}


def preflight(cluster, checkout, directory, *options, seconds=300, **variables):
    """(job as it ended, its log)."""
    job = cluster.sbatch(
        *(*NODES, *options, "slurm/preflight.sh", directory),
        cwd=checkout,
        DSVAE_PREFLIGHT_SECONDS=str(seconds),
        DSVAE_MIN_FREE_GB="0.1",
        **variables,
    )
    ended = cluster.wait(job)
    return ended, (checkout / f"dsvae-preflight-{job}.out").read_text()


def blamed(log):
    return set(re.findall(r"^preflight: BAD (.*?):", log, re.MULTILINE))


def test_all_well(cluster, checkout, tmp_path):
    ended, log = preflight(cluster, checkout, tmp_path / "run")
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert set(re.findall(r"^preflight: rank (\d) on (node\d): ok", log, re.MULTILINE)) == {
        ("0", "node1"),
        ("1", "node1"),
        ("2", "node2"),
        ("3", "node2"),
    }
    assert len(re.findall(r"all-reduce of 16 MiB in [\d.]+ ms, [\d.]+ GB/s", log)) == 4
    assert log.rstrip().endswith("preflight: ok")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_that_cannot_write(cluster, checkout, tmp_path):
    """Training is not begun, and the job ends with preflight's exit code."""
    run = tmp_path / "run"
    run.mkdir()
    cluster.lab("node-exec", "node2", "mount", "--bind", run, run)
    cluster.lab("node-exec", "node2", "mount", "-o", "remount,bind,ro", run)
    try:
        job = cluster.sbatch(
            *(*NODES, "slurm/train.sbatch", "--output_dir", run),
            cwd=checkout,
            DSVAE_PREFLIGHT="1",
            DSVAE_MIN_FREE_GB="0.1",
        )
        ended = cluster.wait(job)
    finally:
        cluster.lab("node-exec", "node2", "umount", run)
    log = (checkout / f"dsvae-{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == FAILED, log
    assert blamed(log) == {"node2"}
    assert f"cannot write to {run}: Read-only file system" in log
    assert "bad: node2. Leave them out with sbatch --exclude=node2" in log
    assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("hidden", ["run", "code"])
def test_a_node_with_a_directory_of_its_own(hidden, cluster, checkout, tmp_path):
    """Its output_dir is another one; or it has not even the code, and cannot start."""
    run = tmp_path / "run"
    run.mkdir()
    place = run if hidden == "run" else checkout / "slurm"
    cluster.lab("node-exec", "node2", "mount", "-t", "tmpfs", "tmpfs", place)
    try:
        there = together(tmp_path, 4 if hidden == "run" else 2)
        ended, log = preflight(cluster, checkout, run, seconds=10, **there)
    finally:
        cluster.lab("node-exec", "node2", "umount", place)
    assert (ended["JobState"], ended["ExitCode"]) == FAILED, log
    assert blamed(log) == {"node2"}
    assert ("is not the directory that node1 sees" if hidden == "run" else "does not see") in log


def test_a_node_that_is_cut_off(cluster, checkout, tmp_path):
    """The ranks of node2 start, but no packet of theirs reaches the rendezvous on
    node1."""
    rule = ("to", "10.77.0.1", "ipproto", "tcp", "dport", "16000-32767", "lookup", "100")
    cluster.lab(
        "node-exec", "node2", "ip", "route", "add", "10.77.0.1", "via", "10.77.0.99", "table", "100"
    )
    cluster.lab("node-exec", "node2", "ip", "rule", "add", *rule)
    try:
        there = together(tmp_path, 4)
        ended, log = preflight(cluster, checkout, tmp_path / "run", seconds=10, **there)
    finally:
        cluster.lab("node-exec", "node2", "ip", "rule", "del", *rule)
        cluster.lab("node-exec", "node2", "ip", "route", "flush", "table", "100")
    assert (ended["JobState"], ended["ExitCode"]) == FAILED, log
    assert blamed(log) == {"node2"}
    assert "rank 0: rank 2 did not arrive within 10 s" in log
    assert re.search(r"BAD node2: rank 3: cannot reach node1 \(node1:\d+\) within 10 s", log)


def test_no_gpu_and_no_space(cluster, checkout, tmp_path):
    ended, log = preflight(
        cluster, checkout, tmp_path / "run", "--gpus-per-node=2", DSVAE_CONTAINER="env DSVAE_TEST=1"
    )
    assert (ended["JobState"], ended["ExitCode"]) == FAILED, log
    assert blamed(log) == {"node1", "node2"}
    assert log.count("SLURM gave GPUs (0,1), but torch") == 4


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [({}, set()), ({3: "2.12"}, {"node2"}), ({0: "2.12", 1: "2.12", 2: "2.12"}, {"node2"})],
)
def test_other_versions(changes, blamed):
    """The node that differs from most ranks."""
    nodes = ["node1", "node1", "node1", "node2"]
    found = [{"python": "3.11", "torch": changes.get(rank, "2.13")} for rank in range(4)]
    lines = list(odd_ones(found, nodes))
    assert {line.split("\t")[0] for line in lines} == blamed
    assert all("torch" in line for line in lines)
