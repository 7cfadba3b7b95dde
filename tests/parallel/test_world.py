"""How the ranks meet."""

import socket

import pytest
import torch.distributed as dist

from dsvae.errors import EXIT_USER_ERROR, UserError, exit_code
from dsvae.parallel.world import join


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_port_that_is_taken_is_named_with_what_to_do(size, monkeypatch):
    """One rank too: `deepspeed --num_gpus 1` beside another run."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in (
            ("RANK", "0"),
            ("LOCAL_RANK", "0"),
            ("WORLD_SIZE", size),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"port {port} of .*already in use.*--master_port") as e:
            join(30)
    assert "\n" not in str(e.value)
    assert exit_code(e.value) == EXIT_USER_ERROR
    assert not dist.is_initialized()
