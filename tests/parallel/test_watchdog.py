"""What the watchdog says of its rank, and of others in the same process."""

import json
import socket
import sys
import threading
import time

import pytest
import torch.distributed as dist

from dsvae.parallel.watchdog import Watchdog

SLEEPS = "def sleeps():\n    begun.set()\n    while not end:\n        time.sleep(0.01)\n"


@pytest.mark.parametrize(
    ("module", "path", "waits"),
    [
        ("dsvae.metrics.passes", "/home/me/deepspeed/dsvae/metrics/passes.py", False),
        ("numpy.linalg", "/opt/torch/distributed/lib/numpy/linalg.py", False),
        ("deepspeed_helpers", "/opt/deepspeed_helpers.py", False),
        ("deepspeed.runtime.engine", "/opt/python/deepspeed/runtime/engine.py", True),
        ("deepspeed", "/opt/frozen.py", True),
        ("torch.distributed.distributed_c10d", "/opt/frozen.py", True),
    ],
)
def test_a_thread_waits_by_the_module_that_it_is_in_wherever_that_lies(module, path, waits):
    """A checkout or an environment can lie below a folder called deepspeed."""
    begun, end = threading.Event(), []
    names = {"__name__": module, "begun": begun, "end": end, "time": time}
    exec(compile(SLEEPS, path, "exec"), names)
    store = dist.HashStore()
    watchdog = Watchdog(store, rank=0, size=1, timeout=600)
    thread = threading.Thread(target=names["sleeps"])
    thread.start()
    try:
        begun.wait()
        while sys._current_frames()[thread.ident].f_globals["__name__"] != module:
            time.sleep(0.001)  # it is still in the line before
        watchdog.report("")  # says how it is
        assert json.loads(store.get("0"))["waits"] is waits
    finally:
        end.append(True)
        thread.join()
        watchdog.close()


def test_the_first_rank_that_leaves_is_named_and_not_one_that_follows_it():
    """A rank that has left because of another has the same code, and may come first by
    its number."""
    store = dist.HashStore()
    watchdogs = [Watchdog(store, rank, size=3, timeout=600) for rank in range(3)]
    watchdogs[2].close(1)
    watchdogs[1].close(1)
    line = f"rank 2 (on {socket.gethostname()}) left with exit code 1"
    assert watchdogs[0].lost() == (line, 1)
    watchdogs[0].close()
