"""What the scripts do with arguments, environment, exit codes and restarts: real jobs, with a stand-in for python."""

import re
import shutil
import subprocess
import time

import pytest
from launch import ROOT

SCRIPTS = sorted(
    [*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / "tests" / "slurm" / "lab.sh", ROOT / ".ci" / "run"]
)
AWKWARD = [
    "--model",
    "a b",
    "--data.text_column",
    'it\'s "quoted" $HOME `id` \\ *',
    "--output_dir",
    "runs/with blank",
    "--phase",
    "",
]


def test_shellcheck_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) > 10
    assert found.stdout == ""


def test_arguments_and_ranks(cluster, checkout, stand_in):
    """Two nodes, two tasks each: one process a rank, every argument as it was given, the rendezvous from the node list."""
    job = cluster.sbatch(
        *("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=3", "slurm/train.sbatch", *AWKWARD),
        cwd=checkout,
        **stand_in.variables,
        OMP_NUM_THREADS="",
    )
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")
    records = stand_in.records(job)
    assert set(records) == {(0, rank) for rank in range(4)}
    code = checkout / "runs/with blank/slurm" / job / "code"
    for (_, rank), record in records.items():
        assert record["arguments"][0] == f"{code}/dsvae/train.py"
        assert record["arguments"][1 : 1 + len(AWKWARD)] == AWKWARD
        assert record["arguments"][1 + len(AWKWARD) :] == ["--ds_config", f"{code}/ds_configs/zero2.json"]
        found = record["environment"]
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert found["SLURMD_NODENAME"] == f"node{1 + rank // 2}"
        assert found["MASTER_ADDR"] == "node1"
        assert 16000 <= int(found["MASTER_PORT"]) < 32768
        assert found["OMP_NUM_THREADS"] == "3"
        assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert found["PYTHONPATH"].split(":")[0] == str(code)
    logs = sorted((checkout / "runs/with blank/slurm" / job).glob("rank-*.log"))
    assert [re.match(r"== rank (\d) of 4 on node(\d)", log.read_text()).groups() for log in logs] == [
        ("0", "1"),
        ("1", "1"),
        ("2", "2"),
        ("3", "2"),
    ]
    assert "== rank 0 of 4" in (checkout / f"dsvae-{job}.out").read_text()


def test_one_visible_gpu_a_task_is_number_0(cluster, checkout, stand_in):
    job = cluster.sbatch(
        *("--ntasks-per-node=2", "--gpus-per-task=1", "slurm/train.sbatch", "--output_dir", "runs/bound"),
        cwd=checkout,
        **stand_in.variables,
        DSVAE_SRUN_ARGS="--gpu-bind=single:1",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    for record in stand_in.records(job).values():
        visible = record["environment"]["CUDA_VISIBLE_DEVICES"].split(",")
        assert record["environment"]["LOCAL_RANK"] == ("0" if len(visible) == 1 else record["environment"]["RANK"])


def test_more_tasks_than_gpus_is_refused(cluster, checkout, stand_in):
    job = cluster.sbatch(
        "--ntasks-per-node=3",
        "--gpus-per-node=2",
        "slurm/train.sbatch",
        "--output_dir",
        "runs/many",
        cwd=checkout,
        **stand_in.variables,
    )
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "3 tasks a node, but 2 GPUs" in (checkout / f"dsvae-{job}.out").read_text()
    assert not stand_in.records(job)


@pytest.mark.parametrize("code", [2, 65, 74])
def test_an_exit_code_that_asks_for_nothing_ends_the_job_with_it(code, cluster, checkout, stand_in):
    job = cluster.sbatch(
        "slurm/train.sbatch", "--output_dir", f"runs/code{code}", cwd=checkout, **stand_in.variables, STAND_IN_CODES=str(code)
    )
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_restarts_run_the_first_code_and_configuration(tmp_path, cluster, checkout, stand_in):
    """75, 69, killed, 0: three restarts; the checkout and the configuration change in between. Then a surplus job."""
    changing = tmp_path / "changing"
    shutil.copytree(checkout, changing, ignore=shutil.ignore_patterns("runs", "*.out"))
    (changing / "mine.yaml").write_text("seed: 1\noutput_dir: 'runs/of the file'\n")
    command = ("slurm/train.sbatch", "--config", "mine.yaml", "--ds_config=ds_configs/zero1.json")
    codes = {**stand_in.variables, "STAND_IN_CODES": "75,69,137,0"}
    job = cluster.sbatch(*command, cwd=changing, **codes)
    cluster.wait(job, {"PENDING"}) if (0, 0) in stand_in.records(job) else None
    run = changing / "runs" / "of the file"
    cluster.wait_for(tmp_path / f"{job}-0-0.json", job)
    for name in ("dsvae/train.py", "slurm/job.sh", "slurm/lib.sh", "mine.yaml", "ds_configs/zero1.json"):
        (changing / name).write_text("changed")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "3")
    records = stand_in.records(job)
    assert sorted(records) == [(start, 0) for start in range(4)]
    arguments = records[0, 0]["arguments"]
    assert all(record["arguments"] == arguments for record in records.values())
    place = run / "slurm" / job
    assert arguments[1:3] == ["--config", f"{place}/config/mine.yaml"]
    assert arguments[3] == f"--ds_config={place}/ds_config/zero1.json"
    assert arguments[4:] == ["--output_dir", "runs/of the file"]
    assert (place / "config" / "mine.yaml").read_text().startswith("seed: 1")
    assert (place / "code" / "dsvae" / "train.py").read_bytes() == (ROOT / "dsvae" / "train.py").read_bytes()
    log = (changing / f"dsvae-{job}.out").read_text()
    assert log.count("start ") == 4
    assert not (changing / ".slurm-jobs" / job).exists()

    for name in ("slurm/job.sh", "slurm/lib.sh", "dsvae/train.py", "ds_configs/zero1.json"):
        shutil.copy(ROOT / name, changing / name)


def test_restarts_are_bounded(cluster, checkout, stand_in):
    jobs = {}
    for code, bound in ((75, "DSVAE_MAX_RESTARTS"), (69, "DSVAE_MAX_FAILURES")):
        jobs[code] = cluster.sbatch(
            *("slurm/train.sbatch", "--output_dir", f"runs/again{code}"),
            cwd=checkout,
            **stand_in.variables,
            STAND_IN_CODES=",".join([str(code)] * 5),
            **{bound: "1"},
        )
    for code, job in jobs.items():
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "1")
        assert len(stand_in.records(job)) == 2
        assert "given up" in (checkout / f"dsvae-{job}.out").read_text()


def test_a_surplus_job_leaves_at_once_and_another_command_does_not(cluster, checkout, stand_in):
    command = ("slurm/train.sbatch", "--output_dir", "runs/surplus", "--seed", "1")
    ran = []
    for arguments in (command, command, (*command[:-1], "2")):
        job = cluster.sbatch(*arguments, cwd=checkout, **stand_in.variables)
        assert cluster.wait(job)["ExitCode"] == "0:0"
        ran.append(len(stand_in.records(job)))
    assert ran == [1, 0, 1]


def test_a_cancelled_job_is_not_requeued(cluster, checkout, stand_in, tmp_path):
    """Its ranks get SIGTERM, save and leave with 75, as for preemption."""
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(
        "#!/bin/bash\ntrap 'sleep 0.5; exit 75' TERM\ntouch " + str(tmp_path / "there") + "\nwhile :; do sleep 0.1; done\n"
    )
    stubborn.chmod(0o755)
    job = cluster.sbatch("slurm/train.sbatch", "--output_dir", "runs/cancelled", cwd=checkout, DSVAE_PYTHON=str(stubborn))
    cluster.wait_for(tmp_path / "there", job)
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    time.sleep(3)
    ended = cluster.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_the_environment_is_made_where_site_says(cluster, checkout, stand_in, tmp_path):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("export VIRTUAL_ENV=made\n")
    modules = tmp_path / "modules.sh"
    modules.write_text('module() { export LOADED="$LOADED $*"; }\n')
    job = cluster.sbatch(
        *("slurm/train.sbatch", "--output_dir", "runs/site"),
        cwd=checkout,
        **stand_in.variables,
        BASH_ENV=str(modules),
        DSVAE_MODULES="python/3.11 cuda/12.8",
        DSVAE_VENV=str(venv.parent),
        DSVAE_CONTAINER="env IN_CONTAINER=1",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    found = stand_in.records(job)[0, 0]["environment"]
    assert found["VIRTUAL_ENV"] == "made"
    assert found["LOADED"].strip() == "load python/3.11 cuda/12.8"
    assert found["IN_CONTAINER"] == "1"
