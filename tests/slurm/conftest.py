"""A real SLURM cluster of two nodes on this machine (lab.sh), one for all tests here;
skips where it cannot be."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, environment

LAB = Path(__file__).with_name("lab.sh")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
FINAL |= {"OUT_OF_MEMORY", "DEADLINE"}
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")

STAND_IN = """#!{python}
# In python's place in a job: writes down how it was called, and ends with the exit code of this start. A member of an array has
# variables of its own, STAND_IN_CODES_2 before STAND_IN_CODES.
import json, os, sys, time
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
def said(name, otherwise):
    mine = f"{{name}}_{{os.environ.get('SLURM_ARRAY_TASK_ID')}}"
    return os.environ.get(mine, os.environ.get(name, otherwise))
code = int(said("STAND_IN_CODES", "0").split(",")[start])
if "dsvae.parallel.preflight" in sys.argv:
    print(f"preflight: rank {{os.environ['RANK']}} on a node: ok")
record = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "start": start}}
name = f"{{os.environ['STAND_IN_RECORDS']}}/{{os.environ['SLURM_JOB_ID']}}-{{start}}-{{os.environ['RANK']}}.json"
open(name + ".tmp", "w").write(json.dumps(record))
os.rename(name + ".tmp", name)
until = said("STAND_IN_UNTIL", "")  # a file
while until and not os.path.exists(until):
    time.sleep(0.1)
if code == 0 and sys.argv[1].endswith("/train.py") and os.environ["RANK"] == "0":
    from dsvae import config, errors, run_directory
    try:
        given = config.merge(config.parse_flags(sys.argv[2:]))
    except errors.UserError:
        sys.exit(0)  # words that only arrive, and mean nothing
    run = run_directory.RunDirectory(given.output_dir)
    run.config.write_text(config.to_yaml(given))
    (run.phase1_model if given.phase == "1" else run.model).mkdir(parents=True, exist_ok=True)
    if given.phase != "1":
        run.metrics.write_text("{{}}")
sys.exit(code)
"""


class Cluster:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = environment(
            LAB_DIR=str(directory),
            DSVAE_PREFLIGHT="0",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
        )
        for name in list(self.environment):
            if name.startswith(("SBATCH_", "SRUN_", "SLURM")):
                del self.environment[name]  # the tests themselves may run in a job

    def start(self) -> None:
        # Its stdin is a pipe that nobody writes to: when pytest ends, however it ends,
        # the lab sees EOF and goes.
        self.process = subprocess.Popen(
            [LAB, "run"],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = self.process.stdout.readline()
        if said != "READY\n":
            said += self.process.stdout.read()
            self.stop()
            raise RuntimeError(said)

    def stop(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)
        self.process.kill()
        self.process.wait()
        subprocess.run([LAB, "stop"], env=self.environment, timeout=200, check=True)

    def lab(self, *command, timeout=200, check=True, cwd=None, **variables) -> str:
        done = subprocess.run(
            [LAB, *map(str, command)],
            env={**self.environment, **variables},
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout + ("" if check else done.stderr)

    def run(self, *command, **options) -> str:
        """A command on the login node."""
        return self.lab("exec", *command, **options)

    def sbatch(self, *arguments, cwd, **variables) -> str:
        """The job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text.split("\n")[0]))

    def wait(self, job: str, states=FINAL, timeout=400) -> dict[str, str]:
        """Until the job is in one of `states`."""
        end = time.monotonic() + timeout
        while True:
            found = self.job(job)
            if found["JobState"] in states:
                return found
            self.release(job, found)
            assert time.monotonic() < end, (
                f"job {job} is {found['JobState']} ({found['Reason']}) after {timeout} s"
            )
            time.sleep(0.2)

    def release(self, job: str, found: dict[str, str]) -> None:
        """A requeued job is held for two minutes: here it starts at once."""
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            # what is left of the start before is gone then, as it is after two minutes
            time.sleep(1)
            self.run("scontrol", "update", f"job={job}", "StartTime=now")

    def wait_for(self, path: Path, job: str, timeout=400) -> None:
        """Until a file exists, while the job lives."""
        end = time.monotonic() + timeout
        while not path.exists():
            found = self.job(job)
            assert found["JobState"] not in FINAL, (
                f"job {job} is {found['JobState']}, and {path} is not there"
            )
            self.release(job, found)
            assert time.monotonic() < end, f"{path} is not there after {timeout} s"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster():
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in NEEDED if not shutil.which(name, path=path)]:
        pytest.skip(
            f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    spaces = ("--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
    namespaces = ["unshare", *spaces, "true"]
    if os.geteuid() != 0 or subprocess.run(namespaces, capture_output=True).returncode:
        pytest.skip("the nodes need namespaces of their own: root with CAP_SYS_ADMIN")
    cluster = Cluster(Path(f"/tmp/lab-{os.getpid()}"))
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of what the scripts need of the repository, in a place with a blank in its
    name: jobs are submitted from it."""
    directory = tmp_path_factory.mktemp("slurm") / "my checkout"
    for name in ("dsvae", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


class StandIn:
    """Takes python's place in jobs; `records` are its calls by (start, rank)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "python"
        path.write_text(STAND_IN.format(python=sys.executable))
        path.chmod(0o755)
        self.variables = {
            "DSVAE_PYTHON": str(path),
            "DSVAE_HOST_PYTHON": sys.executable,
            "STAND_IN_RECORDS": str(directory),
        }

    def records(self, job: str) -> dict[tuple[int, int], dict]:
        found = {}
        for path in self.directory.glob(f"{job}-*.json"):
            _, start, rank = path.stem.split("-")
            found[int(start), int(rank)] = json.loads(path.read_text())
        return found


@pytest.fixture
def stand_in(tmp_path):
    return StandIn(tmp_path)
