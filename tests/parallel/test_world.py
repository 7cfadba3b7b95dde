"""How the ranks meet."""

import os
import socket
import subprocess
import sys

import pytest

from dsvae.errors import EXIT_USER_ERROR

# In a process of its own: in one that has a process group, a rank alone meets nobody.
JOIN = """
import sys
import torch.distributed as dist
from dsvae.errors import exit_code
from dsvae.parallel.world import join

try:
    join(30)
except Exception as error:
    assert not dist.is_initialized()
    print(error)
    sys.exit(exit_code(error))
"""


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_port_that_is_taken_is_named_with_what_to_do(size):
    """One rank too: `deepspeed --num_gpus 1` beside another run."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": size}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        run = subprocess.run(
            [sys.executable, "-c", JOIN],
            env=os.environ | names,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == EXIT_USER_ERROR, run.stderr
    (line,) = run.stdout.splitlines()
    for part in (f"port {port} of 127.0.0.1", "already in use", "--master_port"):
        assert part in line
