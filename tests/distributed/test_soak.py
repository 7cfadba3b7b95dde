"""A run that is killed again and again, anywhere, ends with the losses and the weights
of one that was not.

DSVAE_SOAK_KILLS says how often (default 4); DSVAE_SOAK_SEED picks the moments.
"""

import os
import random
import signal
import time

import pytest
from launch import CONFIGS, start, train
from test_resume import same_as_uncut

KILLS = int(os.environ.get("DSVAE_SOAK_KILLS", "4"))
SEED = int(os.environ.get("DSVAE_SOAK_SEED", "0"))
STEPS = 4 * KILLS + 10  # of each phase


def wait_inside_a_save(run, checkpoints, moments):
    """Until a checkpoint has been begun that is not complete; False if the run ended
    first."""
    known = {path.name for path in checkpoints.glob("phase*") if (path / "COMPLETE").exists()}
    end = time.monotonic() + 400
    while time.monotonic() < end:
        if any(process.poll() is not None for process in run.processes):
            return False
        begun = [
            path
            for path in checkpoints.glob("phase*")
            if path.name not in known and not (path / "COMPLETE").exists()
        ]
        if (
            begun
            and (files := list(begun[0].iterdir()))
            and len(files) >= moments.choice((1, 2, 3))
        ):
            time.sleep(moments.uniform(0, 0.02))
            return True
        time.sleep(0.001)
    raise AssertionError("no checkpoint was begun")


def wait_anywhere(run, checkpoints, moments):
    """Until a random moment after the start of the processes, training or not; False if
    the run ended first."""
    end = time.monotonic() + moments.uniform(0, 6)
    while time.monotonic() < end:
        if any(process.poll() is not None for process in run.processes):
            return False
        time.sleep(0.01)
    return True


@pytest.mark.timeout(600 + 200 * KILLS)
def test_killed_again_and_again(tiny, tmp_path):
    moments = random.Random(SEED)
    # Small steps, a checkpoint at every other: kills fall into saves, between the
    # phases, into the export, and elsewhere.
    common = (
        "--config",
        tiny,
        "--phase1.steps",
        STEPS,
        "--phase2.steps",
        STEPS,
        "--checkpoint_every",
        "2",
        "--eval_every",
        "6",
        "--hang_timeout",
        "30",
    )
    stage = CONFIGS / f"zero{moments.choice((1, 2, 3))}.json"
    train(*common, "--ds_config", stage, "--output_dir", tmp_path / "uncut", ranks=2)

    cut, killed, inside = tmp_path / "cut", 0, 0
    while killed < KILLS:
        run = start(*common, "--ds_config", stage, "--output_dir", cut, ranks=2)
        try:
            where = moments.choice((wait_inside_a_save, wait_inside_a_save, wait_anywhere))
            if not where(run, cut / "checkpoints", moments):
                break  # it had reached its end
            victims = moments.choice(((0,), (1,), (0, 1)))
            run.signal(signal.SIGKILL, victims)
            run.wait(400)  # seconds: ranks that never meet take two time-outs of the rendezvous
            assert all(code in (-signal.SIGKILL, 69) for code in run.codes), (
                run.codes,
                run.stderr[-2000:],
            )
            killed += 1
            inside += where is wait_inside_a_save
            print(
                f"kill {killed}: rank(s) {victims}, {where.__name__.removeprefix('wait_')}",
                flush=True,
            )
        finally:
            run.kill()
    assert inside >= 1
    train(*common, "--ds_config", stage, "--output_dir", cut, ranks=2)
    same_as_uncut(cut, tmp_path / "uncut")
    print(f"{killed} kills, {inside} of them inside a save, {stage.stem}")
