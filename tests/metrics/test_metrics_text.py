"""Text samples where the ranks share every weight."""

import re
from pathlib import Path

from launch import start

SCRIPT = Path(__file__).with_name("diverging_rank.py")


def test_a_rank_that_ends_sooner_leaves_no_other_waiting(tmp_path):
    """At ZeRO 3 every pass gathers the weights from all ranks, so all need equally many.

    The sentences are encoded in one pass per rank; then each rank decodes 12 tokens of two
    latents. Rank 0 ends its own at once, rank 1 never.
    """
    run = start(ranks=2, launcher="forked", script=SCRIPT, cwd=tmp_path)
    try:
        assert run.wait(timeout=100) == 0, run.stderr
    finally:
        run.kill()
    found = dict(re.findall(r"rank (\d): (\d+) passes", run.stdout))
    assert found == {"0": "13", "1": "13"}
    for rank in "01":  # every rank has the texts of both
        (lengths,) = re.findall(rf"rank {rank}: .* passes, (\d+) and (\d+) characters", run.stdout)
        assert [int(length) > 0 for length in lengths] == [False, True]
