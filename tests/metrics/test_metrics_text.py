"""Text samples where the ranks share every weight."""

import re
from pathlib import Path

from launch import start

SCRIPT = Path(__file__).with_name("diverging_rank.py")


def test_a_rank_that_ends_sooner_leaves_no_other_waiting(tmp_path):
    """At ZeRO 3 every pass gathers the weights from all ranks, so all need equally many.

    Of two sentences the means are encoded, one pass each; then 12 tokens are decoded.
    """
    run = start(ranks=2, launcher="forked", script=SCRIPT, cwd=tmp_path)
    try:
        assert run.wait(timeout=100) == 0, run.stderr
    finally:
        run.kill()
    found = dict(re.findall(r"rank (\d): (\d+) passes", run.stdout))
    assert found == {"0": "14", "1": "14"}
    characters = dict(re.findall(r"rank (\d): .* (\d+) characters", run.stdout))
    assert characters["0"] == "0"
    assert int(characters["1"]) > 0
