"""Batches in several processes: the results and their order, errors, and that no process
stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest

from dsvae.data.processes import map_batches
from dsvae.errors import UserError

ROWS = datasets.Dataset.from_dict({"n": list(range(20))})


def described(batch):
    return os.getpid(), batch["n"]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_the_rows(processes):
    pids, batches = zip(*map_batches(described, ROWS, 3, processes), strict=True)
    assert batches == tuple(list(range(20))[i : i + 3] for i in range(0, 20, 3))
    assert (os.getpid() in pids) == (processes < 2)


def test_a_split_of_chosen_rows():
    chosen = ROWS.select([7, 3, 3, 19])
    assert [n for _, n in map_batches(described, chosen, 2, 2)] == [[7, 3], [3, 19]]


def refuse(batch):
    if 9 in batch["n"]:
        raise UserError("row 9 is wrong")
    return batch["n"]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_arrives_as_it_was_raised(processes):
    found = map_batches(refuse, ROWS, 3, processes)
    assert [next(found) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(UserError, match="row 9 is wrong"):
        next(found)


def kill(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error():
    with pytest.raises(UserError, match=r"has ended \(exit code -9\).*memory"):
        list(map_batches(kill, ROWS, 3, 2))


def report(batch):
    print(os.getpid(), flush=True)
    time.sleep(60)


def imported(batch):
    return sorted(sys.modules)


def test_the_processes_start_clean(recwarn):
    """Python warns of a fork while a thread lives, and a fork would have its modules."""
    leave = threading.Event()
    threading.Thread(target=leave.wait).start()
    sys.modules["of_the_parent_alone"] = sys
    try:
        found = list(map_batches(imported, ROWS, 10, 2))
    finally:
        leave.set()
        del sys.modules["of_the_parent_alone"]
    assert not any("of_the_parent_alone" in names for names in found)
    assert not recwarn.list


PARENT = """
import sys, datasets
sys.path.insert(0, sys.argv[1])
from dsvae.data.processes import map_batches
from test_processes import report

list(map_batches(report, datasets.Dataset.from_dict({"n": [0, 1]}), 1, 2))
"""


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_processes_end_with_a_killed_parent():
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            children = [int(parent.stdout.readline()) for _ in range(2)]
        finally:
            parent.kill()
    deadline = time.monotonic() + 30  # half of what the processes would sleep
    while any(map(runs, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
