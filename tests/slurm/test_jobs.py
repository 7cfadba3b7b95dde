"""What the scripts do with arguments, environment, exit codes and restarts: real jobs,
with a stand-in for python."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT

from dsvae import config as configuration
from dsvae.errors import UserError

SCRIPTS = sorted(
    [
        *ROOT.glob("slurm/*.sh"),
        *ROOT.glob("slurm/*.sbatch"),
        ROOT / "tests" / "slurm" / "lab.sh",
        *ROOT.glob(".ci/*"),
    ]
)
AWKWARD = ["--model", "a b", "--data.text_column", 'it\'s "quoted" $HOME `id` \\ *']
AWKWARD += ["--output_dir", "runs/with blank", "--phase", ""]


def words(line):
    return shlex.split(line)


def test_shellcheck_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert len(SCRIPTS) > 10
    assert found.stdout == ""


def test_arguments_and_ranks(cluster, checkout, stand_in):
    """Two nodes, two tasks each: one process a rank, every argument as it was given,
    the rendezvous from the node list."""
    options = words("--nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=3")
    arguments = (*options, "slurm/train.sbatch", *AWKWARD)
    job = cluster.sbatch(*arguments, cwd=checkout, **stand_in.variables, OMP_NUM_THREADS="")
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
        numbers = tuple(int(found[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        assert numbers == (rank, rank % 2, 4)
        assert found["SLURMD_NODENAME"] == f"node{1 + rank // 2}"
        assert found["MASTER_ADDR"] == "node1"
        assert 16000 <= int(found["MASTER_PORT"]) < 32768
        assert found["OMP_NUM_THREADS"] == "3"
        assert found["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert found["PYTHONPATH"].split(":")[0] == str(code)
    logs = sorted((checkout / "runs/with blank/slurm" / job).glob("rank-*.log"))
    headings = [re.match(r"== rank (\d) of 4 on node(\d)", log.read_text()) for log in logs]
    places = [("0", "1"), ("1", "1"), ("2", "2"), ("3", "2")]
    assert [heading.groups() for heading in headings] == places
    assert "== rank 0 of 4" in (checkout / f"dsvae-{job}.out").read_text()


def test_one_visible_gpu_a_task_is_number_0(cluster, checkout, stand_in):
    job = cluster.sbatch(
        *words("--ntasks-per-node=2 --gpus-per-task=1 slurm/train.sbatch --output_dir runs/bound"),
        cwd=checkout,
        **stand_in.variables,
        DSVAE_SRUN_ARGS="--gpu-bind=single:1",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    for record in stand_in.records(job).values():
        found = record["environment"]
        assert (found["CUDA_VISIBLE_DEVICES"], found["LOCAL_RANK"]) == (found["RANK"], "0")
    assert "warning: 1 processor for each rank" in (checkout / f"dsvae-{job}.out").read_text()


def test_without_cpus_per_task_ranks_share_the_processors_of_the_job(cluster, checkout, stand_in):
    job = cluster.sbatch(
        *words("--exclusive --ntasks-per-node=2 slurm/train.sbatch --output_dir runs/whole"),
        cwd=checkout,
        **stand_in.variables,
        OMP_NUM_THREADS="",
    )
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    found = [record["environment"] for record in stand_in.records(job).values()]
    assert [each["OMP_NUM_THREADS"] for each in found] == ["4", "4"]  # of 8 on a node


def test_more_tasks_than_gpus_is_refused(cluster, checkout, stand_in):
    job = cluster.sbatch(
        *words("--ntasks-per-node=3 --gpus-per-node=2 slurm/train.sbatch --output_dir runs/many"),
        cwd=checkout,
        **stand_in.variables,
    )
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert "3 tasks per node, but 2 GPUs" in (checkout / f"dsvae-{job}.out").read_text()
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
    files = "dsvae/train.py slurm/job.sh slurm/lib.sh mine.yaml ds_configs/zero1.json"
    for name in files.split():
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
    train = Path("dsvae", "train.py")
    assert (place / "code" / train).read_bytes() == (ROOT / train).read_bytes()
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
        found = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
        assert found == ("FAILED", f"{code}:0", "1")
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
    assert {job["JobState"] for job in ended} == {"COMPLETED"}
    assert [job["Restarts"] for job in ended] == ["0", "0", "1"]
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
    words = stand_in.records(compared)[0, 0]["arguments"]
    assert words == ["-m", "dsvae.cli", "compare", "runs/inside"]


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
        *words("slurm/train.sbatch --output_dir runs/cancelled"),
        cwd=checkout,
        DSVAE_PYTHON=str(stubborn),
        DSVAE_HOST_PYTHON=sys.executable,
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
    dry_command = (*command[:2], "--dry_run", *AWKWARD)
    mine = {"DSVAE_ACCOUNT": "mine", "DSVAE_QOS": "high"}
    dry = cluster.run(*dry_command, cwd=checkout, **site, **mine)
    asked = words(
        "--partition=urgent --account=mine --qos=high --nodes=2 --cpus-per-task=2 --mem=1000 "
        "--time=7 --gpus-per-node=2 --ntasks-per-node=2 --signal=B:USR1@90 --comment=hello "
        "--exclusive"
    )
    assert words(dry)[:2] == ["sbatch", "--parsable"]
    assert words(dry)[2 : 2 + len(asked)] == asked
    assert words(dry)[3 + len(asked) :][: len(AWKWARD)] == AWKWARD
    typed = {"DSVAE_GPU_OPTION": "gres", "DSVAE_GPU_TYPE": "h100"}
    gres = cluster.run(*dry_command[:3], cwd=checkout, **site, **typed)
    assert "--gres=gpu:h100:2" in words(gres)

    job = cluster.run(*command, cwd=checkout, **site, **stand_in.variables).strip()
    ended = cluster.wait(job)
    found = [ended[name] for name in ("JobState", "Partition", "NumNodes", "TimeLimit")]
    assert found == ["COMPLETED", "urgent", "2", "00:07:00"]
    records = stand_in.records(job)
    assert len(records) == 4
    assert records[0, 3]["arguments"][1 : 1 + len(AWKWARD)] == AWKWARD
    assert "/submitted-" in records[0, 3]["arguments"][0]


def test_dry_runs_start_nothing(cluster, checkout, stand_in):
    before = sorted(checkout.rglob("*"))
    two = cluster.run(
        *words("bash slurm/two_phase.sh --dry_run --config park2021 --output_dir runs/dry"),
        cwd=checkout,
        DSVAE_PHASE1_GPUS_PER_NODE="1",
        DSVAE_PHASE2_GPUS_PER_NODE="2",
        DSVAE_PHASE2_NODES="2",
    ).splitlines()
    first, second = map(words, two)
    assert {"--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1"} <= set(first)
    assert {"--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2"} <= set(second)
    assert "--cpus-per-task=8" in first
    assert "--cpus-per-task=8" in second
    assert first[-2:] == ["--phase", "1"]
    assert second[-2:] == ["--phase", "2"]
    assert "--kill-on-invalid-dep=yes" in second
    assert not any(word.startswith("--dependency") for word in first)

    command = words("bash slurm/sweep.sh --dry_run slurm/sweeps/park2021.txt --config park2021")
    sweep = cluster.run(*command, cwd=checkout)
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
    expected = configuration.read([*arguments, "--ds_config", "x.json"]).output_dir
    assert ask("output_dir", *arguments) == [expected]


def ask(*words, code=0):
    """What the scripts are told; with another code, the one line of the mistake."""
    script = f'. "{ROOT}/slurm/lib.sh"; ask "$@"; printf "%s\\0" "${{ANSWER[@]}}"'
    done = subprocess.run(
        ["bash", "-uc", script, "_", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "DSVAE_HOST_PYTHON": sys.executable},
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        return line
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "value",
    [
        "runs/x  # where",
        "runs/x#1 # one",
        "'runs/x # 1'  # a 'quoted' word",
        '"a \\"b\\" \\\\ # c"   # "d"',
        "'null'",
    ],
)
def test_the_scripts_read_a_file_as_train_does(value, tmp_path, monkeypatch):
    """Comments and quotes."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"output_dir: {value}\nseed: 1\n")
    expected = configuration.read(["--config", "mine.yaml", "--ds_config", "x.json"]).output_dir
    assert ask("output_dir", "--config", "mine.yaml") == [expected]


@pytest.mark.parametrize("value", ["", "~", "[a, b]"])
def test_the_scripts_refuse_a_file_that_train_refuses(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"output_dir: {value}\nseed: 1\n")
    with pytest.raises(UserError) as refused:
        configuration.read(["--config", "mine.yaml", "--ds_config", "x.json"])
    said = ask("output_dir", "--config", "mine.yaml", code=2)
    assert said == f"dsvae: error: {refused.value}"


def test_a_mistake_in_a_command_line_is_found_before_a_job_is_submitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ask("output_dir", "--poolin", "max", code=2).endswith(
        "unknown flag --poolin; did you mean pooling?"
    )
    assert "--config none.yaml: no such file" in ask("output_dir", "--config", "none.yaml", code=2)
    assert "output_dir must be" in ask("output_dir", "--output_dir", "", code=2)


def test_values_are_for_train_to_judge(tmp_path, monkeypatch):
    """A file may make sense only with the rest of the command line, and one member of a
    sweep may have a wrong value."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("phase2:\n  beta: {kind: target}\n")
    assert ask("output_dir", "--config", "mine.yaml", "--phase2.beta.target", "5") == ["runs/mine"]
    assert ask("output_dir", "--pooling", "no such", "--seed", "x") == ["runs/quickstart"]


def test_arguments_are_completed_where_neither_they_nor_their_file_say_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--config", "mine.yaml"]
    for text, added in (
        ("seed: 1", ["--output_dir", "runs/mine", "--ds_config", "zero2.json"]),
        ("ds_config: # zero1\n", ["--output_dir", "runs/mine", "--ds_config", "zero2.json"]),
        ("ds_config: mine.json # of mine", ["--output_dir", "runs/mine"]),
    ):
        Path("mine.yaml").write_text(text)
        assert ask("arguments", "", "zero2.json", *given) == [*given, *added]
    whole = ["--ds-config=a.json", "--output_dir", "b"]
    assert ask("arguments", "", "zero2.json", *whole) == whole


def test_copies_are_made_of_files_alone_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("seed: 1\n")
    Path("zero.json").write_text("{}")
    Path("park2021").write_text("a file that is called like a recipe")
    words = ["--config", "mine.yaml", "--seed", "-1", "--ds-config=zero.json"]
    copied = ["--config", "copies/config/mine.yaml", "--seed", "-1"]
    copied += ["--ds-config=copies/ds_config/zero.json"]
    assert ask("arguments", "copies", "", *words) == copied
    Path("mine.yaml").write_text("seed: 2\n")
    assert ask("arguments", "copies", "", *words) == copied
    assert Path("copies/config/mine.yaml").read_text() == "seed: 1\n"
    assert ask("arguments", "copies", "", "--config", "park2021") == ["--config", "park2021"]


def test_the_members_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(
        "# two\n--pooling max --data.text_column 'a b'\n\n  # three\n--output_dir \"x y\"\n"
    )
    first = ["--seed", "3", "--pooling", "max", "--data.text_column", "a b"]
    place = "runs/list/pooling_max_data.text_column_a-b"
    assert ask("member", "list.txt", "1", "--seed", "3") == [*first, "--output_dir", place]
    assert ask("member", "list.txt", "2") == ["--output_dir", "x y"]
    assert ask("members", "list.txt") == [place, "x y"]
    Path("x y").mkdir()
    Path("x y/.lock").touch()
    assert ask("begun", "list.txt") == ["x y"]
    assert "has 2 runs; there is no run 3" in ask("member", "list.txt", "3", code=2)
    assert "--output_dir is given twice" in ask("members", "list.txt", "--output_dir", "z", code=2)
    for text, says in (
        ("# nothing\n", "list.txt has no line with a run"),
        ("--seed '1\n", "list.txt, run 1: its quotes do not match"),
        ("--seed 1\n--sed 2\n", "list.txt, run 2: unknown flag --sed; did you mean seed?"),
        ("--output_dir x\n--output_dir x\n", "two runs of list.txt write to the same output_dir"),
    ):
        Path("list.txt").write_text(text)
        assert says in ask("members", "list.txt", code=2)
    assert "list of runs none.txt: No such file" in ask("members", "none.txt", code=2)


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
        if path.name not in ("lib.sh", "site.sh", "sweeps")
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
    for name, runs in {"park2021": 18, "paper_grid": 24}.items():
        text = (ROOT / f"slurm/sweeps/{name}.txt").read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert len(lines) == len(set(lines)) == runs
        for line in lines:
            configuration.read([*words(line), "--config", "park2021", "--ds_config", "x.json"])
