"""What the watchdog says of its rank, without other ranks."""

import json
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
        watchdog.complain("")  # says how it is
        assert json.loads(store.get("0"))["waits"] is waits
    finally:
        end.append(True)
        thread.join()
        watchdog.close()
