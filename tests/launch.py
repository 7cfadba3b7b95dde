"""Runs the real training command with real ranks, under a time limit, and leaves no
process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from forked import Forked

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "dsvae" / "train.py"
CONFIGS = ROOT / "ds_configs"

TINY = {
    "data": {"builtin_size": 600, "batch_size": 32, "max_tokens": 24},
    "model": {
        "vocab_size": 516,
        "latent_dim": 6,
        "t5": {
            "d_model": 32,
            "d_kv": 12,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
        },
    },
    "phase1": {"steps": 4, "lr": 1e-3},
    "phase2": {"steps": 4, "lr": 1e-3, "beta": {"kind": "linear", "rise": 0.5}, "free_bits": 0.2},
    "eval": {"shown": 2},
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
}
"""A whole run in a few seconds."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """The test's environment without what a launcher around it may have set."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_")
    return (
        {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        | more
    )


def commands(
    launcher: str, ranks: int, script: Path, more: dict[str, str]
) -> list[tuple[list[str], dict[str, str]]]:
    """(command, environment) of every process to start, without the script's own
    arguments."""
    port = str(free_port())
    if launcher == "deepspeed":
        command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", port, str(script)]
        return [(command, environment(**more))]
    if launcher == "torchrun":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            f"--master-port={port}",
        ]
        return [([*command, str(script)], environment(**more))]
    if launcher == "python":
        return [([sys.executable, str(script)], environment(**more))]
    # As srun starts them: one process a rank, the rendezvous in the environment.
    # `forked` are processes without the imports.
    return [
        (
            [sys.executable, str(script)],
            environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **more,
            ),
        )
        for rank in range(ranks)
    ]


FORKS = sys.platform == "linux" and not torch.cuda.is_available()  # CUDA does not survive a fork


class Run:
    """A started run. `stdout` and `stderr` are those of all ranks together, `codes` the
    exit codes."""

    def __init__(
        self,
        arguments: list[str],
        ranks: int,
        launcher: str,
        cwd: Path | None,
        script: Path,
        env: dict[str, str],
    ) -> None:
        self.processes: list[subprocess.Popen | Forked] = []
        self.codes: list[int] = []
        for command, environ in commands(launcher, ranks, script, env):
            if launcher == "forked" and FORKS:
                forked = Forked([*command[1:], *arguments], environ, cwd or ROOT)
                self.processes.append(forked)
                continue
            self.processes.append(
                subprocess.Popen(
                    [*command, *arguments],
                    env=environ,
                    cwd=cwd or ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
        self.stdout = self.stderr = ""

    def kill(self) -> None:
        """SIGKILL for every process and its children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.communicate()

    def signal(self, number: int, ranks: Iterable[int] | None = None) -> None:
        """Sends a signal to the processes of some ranks (launchers `forked` and `ranks`
        only), by default of all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code: that of the first process that failed, else 0. Kills
        everything at the time limit."""
        end = time.monotonic() + timeout
        self.codes = []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
                self.stdout, self.stderr = self.stdout + out, self.stderr + err
                self.codes.append(process.returncode)
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            raise AssertionError(
                f"the run did not end within {timeout} s\n{stacks[-8000:]}"
            ) from None
        return next((code for code in self.codes if code), 0)

    def _stacks(self) -> str:
        """Ends every process that still runs; the stacks of their threads."""
        found = ""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGABRT)  # PYTHONFAULTHANDLER answers
                with contextlib.suppress(subprocess.TimeoutExpired):
                    found += f"process {process.pid}\n{process.communicate(timeout=60)[1]}"
        self.kill()
        return found

    def wait_for(self, path: Path, timeout: float = 400) -> None:
        """Until a file exists."""
        end = time.monotonic() + timeout
        while not path.exists():
            if any(p.poll() is not None for p in self.processes) or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the run ended, or took too long, before {path} appeared")
            time.sleep(0.005)


def start(
    *arguments: str,
    ranks: int = 1,
    launcher: str = "forked",
    cwd: Path | None = None,
    script: Path = TRAIN,
    **env: str,
) -> Run:
    """A run; the launcher is deepspeed, torchrun, python, ranks (as srun starts them),
    or forked (ranks, sooner: forked.py)."""
    return Run([str(a) for a in arguments], ranks, launcher, cwd, script, env)


def train(
    *arguments: str,
    ranks: int = 1,
    launcher: str = "forked",
    timeout: float = 400,
    code: int = 0,
    cwd: Path | None = None,
    script: Path = TRAIN,
    **env: str,
) -> Run:
    """A run to its end; `code` is the exit code that it must have, `env` more
    environment."""
    run = start(*arguments, ranks=ranks, launcher=launcher, cwd=cwd, script=script, **env)
    found = run.wait(timeout)
    assert found == code, (
        f"exit code {found}, not {code}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    )
    return run


def rows(directory: Path, split: str = "train") -> list[dict]:
    """The rows of metrics.jsonl of one split."""
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def numbers(directory: Path) -> list[dict]:
    """The training rows without what the machine decides."""
    clock = ("tokens_per_s", "flops_per_s", "mfu", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(directory)]
