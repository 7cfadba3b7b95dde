"""Two nodes: the losses of local ranks, and the same losses after a preemption and after
the loss of a node."""

import sys

import pytest
import yaml
from launch import CONFIGS, ROOT, TINY, numbers, rows, train

PATCHED = ROOT / "tests" / "distributed" / "patched_train.py"
STEPS = (
    *("--phase1.steps", "20", "--phase2.steps", "20"),
    *("--checkpoint_every", "10", "--phase1.deletion", "0.2"),
)
NODES = ("--nodes=2", "--ntasks-per-node=1")
WAITING = """#!/bin/bash
# In python's place: the first start stands still behind the checkpoint WHEN until it gets a signal.
export FAULT="pause 0"
if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then exec {python} {patched} "${{@:2}}"; fi
exec {python} "$@"
"""
CHECKPOINT = "run/checkpoints/phase1-step00000010/COMPLETE"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, cache_dir):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "cache_dir": str(cache_dir)}}))
    return ("--config", path, "--ds_config", CONFIGS / "zero2.json")


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """The directory of a run of two local ranks that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(*arguments, *STEPS, "--output_dir", directory, ranks=2)
    assert len(numbers(directory)) == 40
    return directory


def test_two_ranks_per_node_have_the_losses_of_local_ranks(arguments, cluster, checkout, tmp_path):
    words = ("slurm/train.sbatch", *arguments, "--output_dir", tmp_path / "run")
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", *words, cwd=checkout)
    train(*arguments, "--output_dir", tmp_path / "local", ranks=4)
    ended = cluster.wait(job)
    assert ended["ExitCode"] == "0:0", (checkout / f"dsvae-{job}.out").read_text()[-3000:]
    assert len(numbers(tmp_path / "run")) == 8
    assert numbers(tmp_path / "run") == numbers(tmp_path / "local")


@pytest.fixture
def waiting(tmp_path):
    """Variables of a job whose first start never ends by itself."""
    path = tmp_path / "python"
    path.write_text(WAITING.format(python=sys.executable, patched=PATCHED))
    path.chmod(0o755)
    return {
        "DSVAE_PYTHON": str(path),
        "DSVAE_HOST_PYTHON": sys.executable,
        "WHEN": str(tmp_path / CHECKPOINT),
    }


def test_preempted(waiting, arguments, undisturbed, cluster, checkout, tmp_path):
    """A job of a higher partition takes both nodes: SIGTERM to the ranks, a save, back
    into the queue, and on from there."""
    job = cluster.sbatch(
        *(*NODES, "slurm/train.sbatch", *arguments, *STEPS, "--output_dir", tmp_path / "run"),
        cwd=checkout,
        **waiting,
    )
    cluster.wait_for(tmp_path / CHECKPOINT, job)
    urgent = cluster.sbatch(
        "--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 1", cwd=tmp_path
    )
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    ended = cluster.wait(job)
    log = (checkout / f"dsvae-{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        log[-3000:]
    )
    assert "SIGTERM: saved" in log
    assert "resuming from" in log
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 41))
    assert numbers(tmp_path / "run") == numbers(undisturbed)


def test_a_node_dies(waiting, arguments, undisturbed, cluster, checkout, tmp_path):
    """SIGKILL of everything on the node that the batch script runs on; SLURM learns of
    it and requeues."""
    job = cluster.sbatch(
        *(*NODES, "slurm/train.sbatch", *arguments, *STEPS, "--output_dir", tmp_path / "run"),
        cwd=checkout,
        **waiting,
    )
    cluster.wait_for(tmp_path / CHECKPOINT, job)
    cluster.lab("kill-node", "node1")
    cluster.wait(job, {"PENDING"})
    cluster.lab("start-node", "node1")
    ended = cluster.wait(job)
    log = (checkout / f"dsvae-{job}.out").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), (
        log[-3000:]
    )
    assert "resuming from" in log
    assert numbers(tmp_path / "run") == numbers(undisturbed)
