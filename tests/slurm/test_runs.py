"""Jobs that do not disturb each other, all submitted at once: phases in a chain, a
sweep, a time limit; TensorBoard."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import yaml
from launch import TINY, rows

from dsvae.data.grammar_variants import tagged

MEMBERS = """# three runs
--pooling max --phase1.steps 3

--pooling 'no such pooling'
--pooling mean --output_dir "runs/a named one"
"""


@pytest.fixture(scope="module")
def submitted(cluster, checkout, cache_dir):
    (checkout / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "data": {**TINY["data"], "cache_dir": str(cache_dir)}})
    )
    (checkout / "three.txt").write_text(MEMBERS)
    records = [{**each.record, "condition": "says who"} for each in tagged(600, 0)]
    (checkout / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    tiny = ("--config", "tiny.yaml")
    limited = cluster.sbatch(
        *("--time=60", "--signal=B:USR1@600", "slurm/train.sbatch", *tiny),
        *("--output_dir", "runs/limited", "--phase1.steps", "100000", "--log_every", "50"),
        cwd=checkout,
    )

    def script(name, *arguments, **variables):
        return cluster.run("bash", f"slurm/{name}", *arguments, cwd=checkout, **variables).split()

    return SimpleNamespace(
        limited=limited,
        # Phase 1 on one rank, phase 2 on two nodes: checkpoints do not pass between the
        # phases, weights do. All columns are in use.
        chain=script(
            *("two_phase.sh", *tiny, "--output_dir", "runs/chain"),
            *("--train_file", checkout / "records.jsonl", "--condition_column", "condition"),
            *("--label_column", "label", "--tags_column", "tags"),
            DSVAE_PHASE2_NODES="2",
        ),
        broken=script(
            "two_phase.sh", *tiny, "--output_dir", "runs/broken", "--train_file", "not there.txt"
        ),
        sweep=script("sweep.sh", "three.txt", *tiny, DSVAE_AT_ONCE="2"),
    )


def test_a_failed_phase_1_leaves_phase_2_never_started(submitted, cluster, checkout):
    first, second = submitted.broken
    failed, ended = cluster.wait(first), cluster.wait(second)
    assert failed["ExitCode"] == "2:0"
    assert "not there.txt" in (checkout / f"dsvae-phase1-{first}.out").read_text()
    assert ended["JobState"] == "CANCELLED"
    # What tells a job that ran from one that did not. Its times do not: SLURM gives the
    # latter a start at the moment of its end, or none, and then counts its run time
    # from 1970 on.
    places = checkout / "runs/broken/slurm"
    for job, record, phase, ran in ((first, failed, 1, True), (second, ended, 2, False)):
        assert ("BatchHost" in record) == ran
        assert (record["NodeList"] not in ("", "(null)")) == ran
        assert (places / job).exists() == ran
        assert (checkout / f"dsvae-phase{phase}-{job}.out").exists() == ran


def test_phase_2_goes_on_from_phase_1_with_resources_of_its_own(submitted, cluster, checkout):
    first, second = (cluster.wait(job) for job in submitted.chain)
    assert (first["ExitCode"], second["ExitCode"]) == ("0:0", "0:0")
    assert (first["NumNodes"], second["NumNodes"]) == ("1", "2")
    assert [(row["step"], row["phase"]) for row in rows(checkout / "runs/chain")] == [
        (i, 1 + (i > 4)) for i in range(1, 9)
    ]
    # What a run says of its data ends in its number of ranks.
    first, second = submitted.chain
    for phase, job, ranks in ((1, first, "1 rank"), (2, second, "2 ranks")):
        log = (checkout / f"dsvae-phase{phase}-{job}.out").read_text()
        assert re.search(rf"^data: .*; {ranks}$", log, re.MULTILINE)
    scores = json.loads((checkout / "runs/chain/metrics.json").read_text())["test"]
    assert {"kl", "class_accuracy", "entity_f1"} <= scores.keys()
    config = json.loads((checkout / "runs/chain/model/config.json").read_text())
    assert (config["conditional"], config["prior"]) == (True, "learned")
    assert config["classes"] == ["none", "occupation"]
    assert config["tags"] == ["B-OBJ", "B-PROF", "I-OBJ", "O"]


def test_a_sweep_with_a_failing_member(submitted, cluster, checkout):
    array, compare = submitted.sweep
    ended = cluster.wait(compare)
    codes = re.findall(
        r"ArrayTaskId=(\d).*? ExitCode=(\S+)", cluster.run("scontrol", "-o", "show", "job", array)
    )
    assert sorted(codes) == [("1", "0:0"), ("2", "2:0"), ("3", "0:0")]
    assert len(rows(checkout / "runs/three/pooling_max_phase1.steps_3")) == 7
    assert len(rows(checkout / "runs/a named one")) == 8
    # The whole configuration of a member, not only its line.
    found = yaml.safe_load((checkout / "runs/a named one/config.yaml").read_text())
    assert (found["model"]["pooling"], found["phase1"]["steps"]) == ("mean", 4)
    log = (checkout / f"dsvae-compare-{compare}.out").read_text()
    assert ended["ExitCode"] == "0:0", log
    assert "a named one" in log
    assert "never began: runs/three/pooling_no-such-pooling" in log


def test_the_time_limit_is_met_by_a_save(submitted, cluster, checkout):
    """The limit comes near once the run trains, however long that takes; SLURM looks at
    limits twice a minute. From the signal on the run has ten minutes."""
    job = submitted.limited
    place = checkout / "runs" / "limited"
    cluster.wait_for(place / "metrics.jsonl", job)
    cluster.run("scontrol", "update", f"job={job}", "TimeLimit=10")
    cluster.wait(job, {"PENDING"})
    cluster.run("scontrol", "update", f"job={job}", "TimeLimit=60")
    cluster.wait(job, {"RUNNING"})
    log = checkout / f"dsvae-{job}.out"
    end = time.monotonic() + 400
    while "resuming from" not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    text = log.read_text()
    assert "SIGUSR1: saved" in text
    assert "stopped by a signal: requeued" in text
    assert "DUE TO TIME LIMIT" not in text
    (saved,) = re.findall(r"resuming from \S*phase1-step(\d+)", text)
    steps = [row["step"] for row in rows(place)]
    assert 0 < int(saved) < 100_000
    assert steps == sorted(set(steps))
    assert json.loads(
        (place / "checkpoints" / "latest").read_text().strip().replace("phase1-step", "1")
    ) > int(saved)


def test_tensorboard_listens_on_the_nodes_localhost_only(cluster, checkout):
    job = cluster.sbatch(
        "slurm/tensorboard.sbatch",
        "runs",
        cwd=checkout,
        DSVAE_LOGIN_NODE="login.example.org",
        USER="me",
    )
    log = checkout / f"dsvae-tensorboard-{job}.out"
    end = time.monotonic() + 400
    get = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=60).status)"
    said = ""
    while "200" not in said:
        assert time.monotonic() < end, said + (log.read_text() if log.exists() else "")
        time.sleep(0.5)
        if log.exists() and (
            line := re.search(
                r"ssh -N -L (\d+):localhost:(\d+) -J me@login.example.org me@(node\d)",
                log.read_text(),
            )
        ):
            port, same, node = line.groups()
            assert port == same
            said = cluster.lab(
                "node-exec", node, "python", "-c", get, f"http://localhost:{port}/", check=False
            )
    elsewhere = cluster.run("python", "-c", get, f"http://{node}:{port}/", check=False)
    assert "Connection refused" in elsewhere
    cluster.run("scancel", job)
    cluster.wait(job)
