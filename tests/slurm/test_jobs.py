"""What the scripts do with arguments, environment, exit codes and restarts: real jobs,
with a stand-in for python."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from launch import ROOT

from dsvae import config as configuration

SCRIPTS = sorted(
    [
        *ROOT.glob("slurm/*.sh"),
        *ROOT.glob("slurm/*.sbatch"),
        ROOT / "tests" / "slurm" / "lab.sh",
        ROOT / ".ci" / "run",
    ]
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
    """Two nodes, two tasks each: one process a rank, every argument as it was given,
    the rendezvous from the node list."""
    job = cluster.sbatch(
        *(
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=2",
            "--cpus-per-task=3",
            "slurm/train.sbatch",
            *AWKWARD,
        ),
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
        assert record["arguments"][1 + len(AWKWARD) :] == [
            "--ds_config",
            f"{code}/ds_configs/zero2.json",
        ]
        found = record["environment"]
        assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == (
            str(rank),
            str(rank % 2),
            "4",
        )
        assert found["SLURMD_NODENAME"] == f"node{1 + rank // 2}"
        assert found["MASTER_ADDR"] == "node1"
        assert 16000 <= int(found["MASTER_PORT"]) < 32768
        assert found["OMP_NUM_THREADS"] == "3"
        assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert found["PYTHONPATH"].split(":")[0] == str(code)
    logs = sorted((checkout / "runs/with blank/slurm" / job).glob("rank-*.log"))
    assert [
        re.match(r"== rank (\d) of 4 on node(\d)", log.read_text()).groups() for log in logs
    ] == [
        ("0", "1"),
        ("1", "1"),
        ("2", "2"),
        ("3", "2"),
    ]
    assert "== rank 0 of 4" in (checkout / f"dsvae-{job}.out").read_text()


def test_one_visible_gpu_a_task_is_number_0(cluster, checkout, stand_in):
    job = cluster.sbatch(
        *(
            "--ntasks-per-node=2",
            "--gpus-per-task=1",
            "slurm/train.sbatch",
            "--output_dir",
            "runs/bound",
        ),
        cwd=checkout,
        **stand_in.variables,
        DSVAE_SRUN_ARGS="--gpu-bind=single:1",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    for record in stand_in.records(job).values():
        found = record["environment"]
        assert (found["CUDA_VISIBLE_DEVICES"], found["LOCAL_RANK"]) == (found["RANK"], "0")


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


def test_an_exit_code_that_asks_for_nothing_ends_the_job_with_it(cluster, checkout, stand_in):
    """130 too: a SIGINT is sent by someone who wants the run to end."""
    jobs = {
        code: cluster.sbatch(
            *("slurm/train.sbatch", "--output_dir", f"runs/code{code}"),
            cwd=checkout,
            **stand_in.variables,
            STAND_IN_CODES=",".join([str(code)] * 9),
        )
        for code in (2, 65, 74, 130)
    }
    for code, job in jobs.items():
        ended = cluster.wait(job)
        found = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
        assert found == ("FAILED", f"{code}:0", "0")


def test_restarts_run_the_first_code_and_configuration(tmp_path, cluster, checkout, stand_in):
    """75, 69, killed, 0: three restarts; the checkout and the configuration change in
    between."""
    changing = tmp_path / "changing"
    shutil.copytree(checkout, changing, ignore=shutil.ignore_patterns("runs", "*.out"))
    (changing / "mine.yaml").write_text("seed: 1\noutput_dir: 'runs/of the file'\n")
    command = ("slurm/train.sbatch", "--config", "mine.yaml", "--ds_config=ds_configs/zero1.json")
    codes = {**stand_in.variables, "STAND_IN_CODES": "75,69,137,0"}
    job = cluster.sbatch(*command, cwd=changing, **codes)
    run = changing / "runs" / "of the file"
    cluster.wait_for(tmp_path / f"{job}-0-0.json", job)
    for name in (
        "dsvae/train.py",
        "slurm/job.sh",
        "slurm/lib.sh",
        "mine.yaml",
        "ds_configs/zero1.json",
    ):
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
    assert (place / "code" / "dsvae" / "train.py").read_bytes() == (
        ROOT / "dsvae" / "train.py"
    ).read_bytes()
    log = (changing / f"dsvae-{job}.out").read_text()
    assert log.count("== rank 0 of 1") == 4


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
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (
            "FAILED",
            f"{code}:0",
            "1",
        )
        assert len(stand_in.records(job)) == 2
        assert "given up" in (checkout / f"dsvae-{job}.out").read_text()


def test_only_the_member_that_asks_for_it_is_requeued(cluster, checkout, stand_in, tmp_path):
    """SLURM gives the array's own id to the member that starts last: it saves when the
    first has finished and the second runs."""
    (checkout / "members.txt").write_text(
        "".join(f"--seed {i} --output_dir runs/member{i}\n" for i in (1, 2, 3))
    )
    array = cluster.sbatch(
        *("--array=1-3", "slurm/sweep.sbatch", "members.txt"),
        cwd=checkout,
        **stand_in.variables,
        STAND_IN_CODES_3="75,0",
        STAND_IN_UNTIL_2=str(tmp_path / "end"),
        STAND_IN_UNTIL_3=str(tmp_path / "save"),
    )
    members = [f"{array}_{i}" for i in (1, 2, 3)]
    for member in members[1:]:
        cluster.wait(member, {"RUNNING"})
    first, second, third = ids = [cluster.job(member)["JobId"] for member in members]
    assert third == array
    assert len(set(ids)) == 3
    for member, job in zip(members[1:], ids[1:], strict=True):
        cluster.wait_for(tmp_path / f"{job}-0-0.json", member)
    cluster.wait(members[0])
    (tmp_path / "save").touch()
    cluster.wait_for(tmp_path / f"{third}-1-0.json", members[2])
    cluster.wait(members[2])
    assert cluster.job(members[1])["JobState"] == "RUNNING"
    (tmp_path / "end").touch()
    ended = [cluster.wait(member) for member in members]
    assert [(job["JobState"], job["Restarts"]) for job in ended] == [
        ("COMPLETED", "0"),
        ("COMPLETED", "0"),
        ("COMPLETED", "1"),
    ]
    assert [sorted(stand_in.records(job)) for job in ids] == [[(0, 0)], [(0, 0)], [(0, 0), (1, 0)]]
    # Nothing that a member has is another's: the port of its ranks, its log, its place
    # beside the run.
    records = {i: stand_in.records(job) for i, job in enumerate(ids, start=1)}
    assert len({record[0, 0]["environment"]["MASTER_PORT"] for record in records.values()}) == 3
    for i, starts in records.items():
        code = checkout / f"runs/member{i}/slurm/{array}_{i}/code/dsvae/train.py"
        assert {record["arguments"][0] for record in starts.values()} == {str(code)}
        log = (checkout / f"dsvae-sweep-{array}_{i}.out").read_text()
        assert log.count("== rank 0 of 1") == len(starts)
    assert not [job for job in ids if (checkout / ".slurm-jobs" / job).is_symlink()]


def test_an_array_of_the_training_script(cluster, checkout, stand_in):
    """One run as a chain of jobs; for SLURM the last of them has the number of all."""
    chain = ("--array=1-2%1", "slurm/train.sbatch", "--output_dir", "runs/chained")
    array = cluster.sbatch(*chain, cwd=checkout, **stand_in.variables)
    members = [f"{array}_1", f"{array}_2"]
    ended = [cluster.wait(member) for member in members]
    assert ended[1]["JobId"] == array
    assert [job["ExitCode"] for job in ended] == ["0:0", "0:0"]
    assert [len(stand_in.records(job["JobId"])) for job in ended] == [1, 0]
    assert "finished already" in (checkout / f"dsvae-{array}.out").read_text()


def test_a_job_submitted_from_inside_an_array_is_none_of_its_members(cluster, checkout, stand_in):
    """sbatch hands on SLURM_ARRAY_*."""
    inherited = {"SLURM_ARRAY_JOB_ID": "999", "SLURM_ARRAY_TASK_ID": "1"}
    command = ("slurm/train.sbatch", "--output_dir", "runs/inside")
    job = cluster.sbatch(
        *command, cwd=checkout, **stand_in.variables, **inherited, STAND_IN_CODES="75,0"
    )
    (checkout / "one.txt").write_text("--output_dir runs/inside\n")
    # without an index: the comparison
    compare = ("--output=%x-%j.out", "slurm/sweep.sbatch", "one.txt")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), (
        checkout / f"dsvae-{job}.out"
    ).read_text()
    assert (checkout / "runs/inside/slurm" / job / "rank-0.log").exists()
    compared = cluster.sbatch(*compare, cwd=checkout, **stand_in.variables, **inherited, RANK="0")
    assert cluster.wait(compared)["ExitCode"] == "0:0"
    assert stand_in.records(compared)[0, 0]["arguments"] == ["-m", "dsvae.cli", "compare"]


def test_a_surplus_job_leaves_at_once_and_another_command_does_not(cluster, checkout, stand_in):
    mine = checkout / "mine.yaml"
    mine.write_text("seed: 1\n")
    command = ("slurm/train.sbatch", "--config", "mine.yaml", "--output_dir", "runs/surplus")
    ran = []
    for arguments in (command, command, (*command, "--seed", "2"), command):
        if len(ran) == 3:
            mine.write_text("seed: 3\n")
        job = cluster.sbatch(*arguments, cwd=checkout, **stand_in.variables)
        assert cluster.wait(job)["ExitCode"] == "0:0"
        ran.append(len(stand_in.records(job)))
    assert ran == [1, 0, 1, 1]


def test_a_cancelled_job_is_not_requeued(cluster, checkout, stand_in, tmp_path):
    """Its ranks get SIGTERM, save and leave with 75, as for preemption."""
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(
        "#!/bin/bash\ntrap 'sleep 0.5; exit 75' TERM; trap '' USR1\ntouch "
        + str(tmp_path / "there")
        + "\nwhile :; do sleep 0.1; done\n"
    )
    stubborn.chmod(0o755)
    job = cluster.sbatch(
        "slurm/train.sbatch",
        "--output_dir",
        "runs/cancelled",
        cwd=checkout,
        DSVAE_PYTHON=str(stubborn),
    )
    cluster.wait_for(tmp_path / "there", job)
    cluster.run("scancel", job)
    log, decided = checkout / f"dsvae-{job}.out", "SLURM is ending the job"
    end = time.monotonic() + 300
    while decided not in log.read_text():  # the script's last line
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_the_environment_is_made_where_site_says(cluster, checkout, stand_in, tmp_path):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("export VIRTUAL_ENV=made\n")
    modules = tmp_path / "modules.sh"
    modules.write_text('module() { export LOADED="$LOADED $*"; }\n')
    scripts = (("slurm/train.sbatch", "--output_dir", "runs/site"), ("slurm/preflight.sh", "runs"))
    for script in scripts:
        job = cluster.sbatch(
            *script,
            cwd=checkout,
            **stand_in.variables,
            # as sbatch finds it in the shell of someone who has conda
            VIRTUAL_ENV="/home/me/other",
            CONDA_PREFIX="/home/me/conda/base",
            BASH_ENV=str(modules),
            DSVAE_MODULES="python/3.11 cuda/12.8",
            DSVAE_VENV=str(venv.parent),
            DSVAE_CONTAINER="env IN_CONTAINER=1",
            DSVAE_PREFLIGHT="1",
        )
        assert cluster.wait(job)["JobState"] == "COMPLETED"
        found = stand_in.records(job)[0, 0]
        assert ("dsvae.parallel.preflight" in found["arguments"]) == (
            script[0] == "slurm/preflight.sh"
        )
        assert found["environment"]["VIRTUAL_ENV"] == "made"
        assert found["environment"]["LOADED"].strip() == "load python/3.11 cuda/12.8"  # once
        assert found["environment"]["IN_CONTAINER"] == "1"


def words(line):
    return shlex.split(line)


def test_submit_asks_for_what_the_site_needs(cluster, checkout, stand_in):
    site = {
        "DSVAE_PARTITION": "urgent",
        "DSVAE_NODES": "2",
        "DSVAE_GPUS_PER_NODE": "2",
        "DSVAE_CPUS_PER_RANK": "2",
        "DSVAE_MEM": "1000",
        "DSVAE_TIME": "7",
        "DSVAE_SIGNAL_SECONDS": "90",
        "DSVAE_SBATCH_ARGS": "--comment=hello --exclusive",
    }
    command = ("bash", "slurm/submit.sh", *AWKWARD)
    dry = cluster.run(
        *command[:2],
        "--dry_run",
        *AWKWARD,
        cwd=checkout,
        **site,
        DSVAE_ACCOUNT="mine",
        DSVAE_QOS="high",
    )
    asked = [
        "--partition=urgent",
        "--account=mine",
        "--qos=high",
        "--nodes=2",
        "--cpus-per-task=2",
        "--mem=1000",
        "--time=7",
    ]
    asked += [
        "--gpus-per-node=2",
        "--ntasks-per-node=2",
        "--signal=B:USR1@90",
        "--comment=hello",
        "--exclusive",
    ]
    assert words(dry)[:2] == ["sbatch", "--parsable"]
    assert words(dry)[2 : 2 + len(asked)] == asked
    assert words(dry)[3 + len(asked) :][: len(AWKWARD)] == AWKWARD
    gres = cluster.run(
        *command[:2],
        "--dry_run",
        cwd=checkout,
        **site,
        DSVAE_GPU_OPTION="gres",
        DSVAE_GPU_TYPE="h100",
    )
    assert "--gres=gpu:h100:2" in words(gres)

    job = cluster.run(*command, cwd=checkout, **site, **stand_in.variables).strip()
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Partition"], ended["NumNodes"], ended["TimeLimit"]) == (
        "COMPLETED",
        "urgent",
        "2",
        "00:07:00",
    )
    records = stand_in.records(job)
    assert len(records) == 4
    assert records[0, 3]["arguments"][1 : 1 + len(AWKWARD)] == AWKWARD
    assert "/submitted-" in records[0, 3]["arguments"][0]


def test_dry_runs_start_nothing(cluster, checkout, stand_in):
    before = sorted(checkout.rglob("*"))
    two = cluster.run(
        *(
            "bash",
            "slurm/two_phase.sh",
            "--dry_run",
            "--config",
            "park2021",
            "--output_dir",
            "runs/dry",
        ),
        cwd=checkout,
        DSVAE_PHASE1_GPUS_PER_NODE="1",
        DSVAE_PHASE2_GPUS_PER_NODE="2",
        DSVAE_PHASE2_NODES="2",
    ).splitlines()
    first, second = map(words, two)
    assert {"--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1"} <= set(first)
    assert {"--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"} <= set(second)
    assert first[-2:] == ["--phase", "1"]
    assert second[-2:] == ["--phase", "2"]
    assert "--kill-on-invalid-dep=yes" in second
    assert not any(word.startswith("--dependency") for word in first)

    sweep = cluster.run(
        "bash",
        "slurm/sweep.sh",
        "--dry_run",
        "slurm/sweeps/park2021.txt",
        "--config",
        "park2021",
        cwd=checkout,
    )
    assert "--array=1-18%4" in words(sweep.splitlines()[0])
    assert len(set(sweep.splitlines()[2:])) == 18
    assert sorted(checkout.rglob("*")) == before
    assert cluster.run("squeue", "-h") == ""

    jobs = [
        cluster.sbatch(
            script, "--dry_run", "--output_dir", "runs/dry", cwd=checkout, **stand_in.variables
        )
        for script in ("slurm/train.sbatch", "slurm/tensorboard.sbatch")
    ]
    for job, name, expected in zip(
        jobs, ("dsvae", "dsvae-tensorboard"), ("srun ", "tensorboard.main"), strict=True
    ):
        assert cluster.wait(job)["ExitCode"] == "0:0"
        assert expected in (checkout / f"{name}-{job}.out").read_text()
    assert not list(stand_in.directory.glob("*.json"))
    assert not (checkout / "runs" / "dry").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "park2021"],
        ["--config=vanilla", "--seed", "3"],
        [],
        ["--output-dir", "a b"],
        ["--config", "mine.yaml"],
        ["--config", "named.yaml"],
        ["--seed", "1", "--output_dir=x=y"],
    ],
)
def test_the_scripts_know_where_train_writes(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("seed: 1\n")
    Path("named.yaml").write_text('data:\n  cache_dir: z\noutput_dir: "runs/of the file"  \n')
    script = f'. "{ROOT}/slurm/site.sh"; . "{ROOT}/slurm/lib.sh"; run_dir "{ROOT}" "$@"'
    found = subprocess.run(
        ["bash", "-uc", script, "_", *arguments], capture_output=True, text=True, check=True
    ).stdout
    assert found == configuration.read([*arguments, "--ds_config", "x.json"]).output_dir


@pytest.mark.parametrize(
    "value",
    [
        "runs/x  # where",
        "runs/x #",
        "runs/x#1 # one",
        "it's # 'there'",
        "'runs/x # 1'  # a 'quoted' word",
        "'it''s'",
        '"runs/x # 1" #"',
        '"a \\"b\\" \\\\ # c"   # "d"',
        '"#1"',
        "# the default",
        "~",
        "null  # the default",
        "'null'",
        "",
    ],
)
def test_the_scripts_read_a_value_as_yaml_does(value, tmp_path, monkeypatch):
    """Comments, quotes, nothing: against PyYAML."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"output_dir: {value}\nseed: 1\n")
    script = (
        f'. "{ROOT}/slurm/site.sh"; . "{ROOT}/slurm/lib.sh"; run_dir "{ROOT}" --config mine.yaml'
    )
    found = subprocess.run(
        ["bash", "-uc", script], capture_output=True, text=True, check=True
    ).stdout
    assert found == (yaml.safe_load(Path("mine.yaml").read_text())["output_dir"] or "runs/mine")


def test_a_commented_ds_config_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = (
        f'. "{ROOT}/slurm/site.sh"; . "{ROOT}/slurm/lib.sh"; complete_args CODE RUN --config '
        f'mine.yaml; echo "${{ARGS[@]}}"'
    )
    for value, added in (("# zero2", True), ("mine.json # of mine", False)):
        Path("mine.yaml").write_text(f"ds_config: {value}\n")
        found = subprocess.run(
            ["bash", "-uc", script], capture_output=True, text=True, check=True
        ).stdout
        assert ("--ds_config CODE/ds_configs/zero2.json" in found) is added


@pytest.mark.parametrize("version", ["3 2", "4 3", "4 4", "5 0"])
def test_an_old_bash_is_refused_by_every_script(version, tmp_path):
    """bash does not let its version be set: here the scripts read it elsewhere."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    library = tmp_path / "slurm" / "lib.sh"
    library.write_text(
        f"VERSION=({version})\n" + library.read_text().replace("BASH_VERSINFO", "VERSION")
    )
    if version in ("4 4", "5 0"):
        subprocess.run(["bash", "-uc", ". slurm/lib.sh && say well"], cwd=tmp_path, check=True)
        return
    called = [
        path.name
        for path in (tmp_path / "slurm").iterdir()
        if path.name not in ("lib.sh", "site.sh", "members.sh", "sweeps")
    ]
    assert len(called) == 9
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "DSVAE_ROOT": str(tmp_path),
        "PATH": os.environ["PATH"],
    }
    job["DSVAE_PYTHON"] = "false"  # a script that goes on starts nothing
    for name in called:
        done = subprocess.run(
            ["bash", f"slurm/{name}", "x"], cwd=tmp_path, env=job, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), (
            name,
            done.stderr,
        )
        assert f"bash {version.replace(' ', '.')} on " in done.stderr
        assert "4.4 or newer is needed" in done.stderr


def test_every_line_of_the_shipped_sweeps_is_a_run():
    for path in ROOT.glob("slurm/sweeps/*.txt"):
        lines = [
            line for line in path.read_text().splitlines() if line and not line.startswith("#")
        ]
        assert len(lines) == len(set(lines)) == 18
        for line in lines:
            configuration.read([*words(line), "--config", "park2021", "--ds_config", "x.json"])
