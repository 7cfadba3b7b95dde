"""What tests of an engine in this process share."""

import pytest

from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.parallel.world import joined


@pytest.fixture(scope="session")
def world():
    # One for the whole session: DeepSpeed keeps its groups for the life of the process.
    with joined() as world:
        lend_to_deepspeed(world)
        yield world
