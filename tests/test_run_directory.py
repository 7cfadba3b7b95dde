"""Whose an output directory is, and where in it a run continues."""

import json
import os
import subprocess
import sys

import pytest

from dsvae.config import RunConfig, build, to_yaml
from dsvae.errors import UserError
from dsvae.run_directory import RunDirectory
from dsvae.start import Start, data_of, find_start


def config_of(directory, **fields):
    return build({"ds_config": "x.json", "output_dir": str(directory), **fields}, where="test")


def leave_run(directory, **fields):
    """What a run has left once it started; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config_of(directory, **fields)))
    return directory


def leave_checkpoint(directory, phase, step, sound=True):
    path = directory / "checkpoints" / f"phase{phase}-step{step:08d}"
    path.mkdir(parents=True)
    files = {} if sound else {"lost.pt": {"bytes": 1, "sha256": ""}}
    (path / "COMPLETE").write_text(json.dumps({"meta": {}, "files": files}))


def leave_phase1(directory):
    (directory / "phase1" / "model").mkdir(parents=True)
    return directory / "phase1" / "model"


def leave_results(directory):
    (directory / "model").mkdir()
    (directory / "metrics.json").write_text("{}")


def find(config, report=pytest.fail):
    start = find_start(config, report)
    at = (start.checkpoint.phase, start.checkpoint.step) if start.checkpoint else None
    return start.phases, at, start.weights


def test_a_claim_makes_the_directory_and_leaves_nothing_but_the_lock(tmp_path):
    with RunDirectory(tmp_path / "a" / "b").claim():
        assert os.listdir(tmp_path / "a" / "b") == [".lock"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"output_dir {path}: .*--output_dir"):
            RunDirectory(path).claim()


def test_one_run_at_a_time(tmp_path):
    first = RunDirectory(tmp_path).claim()
    with pytest.raises(UserError, match="still alive"):
        RunDirectory(tmp_path).claim()
    with RunDirectory(tmp_path / "other").claim():
        pass
    first.close()
    RunDirectory(tmp_path).claim().close()


def test_a_killed_run_no_longer_holds_its_directory(tmp_path):
    code = (
        "import fcntl, os, signal, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, "
        "fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lock")]).returncode == -9
    RunDirectory(tmp_path).claim().close()


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize(("phase", "phases"), [("all", [1, 2]), ("1", [1]), ("2", [2])])
def test_afresh(tmp_path, resume, phase, phases):
    config = config_of(tmp_path, resume=resume, phase=phase, phase1={"steps": 70})
    start = find_start(config, pytest.fail)
    assert start == Start(phases)
    assert start.phase(phases[-1], config).offset == (70 if phase == "all" else 0)


def test_never_where_a_run_lies(tmp_path):
    leave_run(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} holds a run"):
        find(config_of(tmp_path, resume="never"))


def test_a_run_without_a_checkpoint_starts_anew(tmp_path):
    assert find(config_of(leave_run(tmp_path))) == ([1, 2], None, None)


def test_in_phase_1(tmp_path):
    leave_checkpoint(leave_run(tmp_path), 1, 20)
    leave_checkpoint(tmp_path, 1, 100)
    assert find(config_of(tmp_path)) == ([1, 2], (1, 100), None)
    assert find(config_of(tmp_path, phase="1")) == ([1], (1, 100), None)


def test_between_the_phases(tmp_path):
    """Phase 1's weights are there: nothing of phase 1 is done again, whatever
    checkpoints of it remain."""
    leave_checkpoint(leave_run(tmp_path), 1, 100)
    between = leave_phase1(tmp_path)
    assert find(config_of(tmp_path)) == ([2], None, between)
    assert find(config_of(tmp_path, phase="2")) == ([2], None, between)
    assert find(config_of(tmp_path, phase="1")) == ([], None, None)


def test_in_phase_2(tmp_path):
    leave_checkpoint(leave_run(tmp_path), 1, 100)
    leave_checkpoint(tmp_path, 2, 3)
    between = leave_phase1(tmp_path)
    assert find(config_of(tmp_path)) == ([2], (2, 3), between)


def test_in_a_phase_2_without_a_phase_1(tmp_path):
    leave_checkpoint(leave_run(tmp_path, phase="2"), 2, 3)
    assert find(config_of(tmp_path, phase="2")) == ([2], (2, 3), None)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path):
    leave_checkpoint(leave_run(tmp_path), 2, 10)
    leave_checkpoint(tmp_path, 2, 20, sound=False)
    between = leave_phase1(tmp_path)
    lines = []
    assert find(config_of(tmp_path), lines.append) == ([2], (2, 10), between)
    assert len(lines) == 1
    assert "phase2-step00000020" in lines[0]


@pytest.mark.parametrize("missing", [None, "model", "metrics.json"])
def test_finished_once_all_is_there(tmp_path, missing):
    leave_checkpoint(leave_run(tmp_path), 2, 10)
    between = leave_phase1(tmp_path)
    leave_results(tmp_path)
    if missing == "model":
        (tmp_path / missing).rmdir()
    elif missing:
        (tmp_path / missing).unlink()
    assert find(config_of(tmp_path)) == (
        ([], None, None) if missing is None else ([2], (2, 10), between)
    )


def test_other_values_are_named(tmp_path):
    leave_checkpoint(leave_run(tmp_path, seed=1), 1, 10)
    with pytest.raises(
        UserError,
        match=r"seed: 1 -> 2; phase2\.beta\.max: 1\.0 -> 0\.5: choose another --output_dir",
    ):
        find(config_of(tmp_path, seed=2, phase2={"beta": {"max": 0.5}}))
    many = {"seed": 2, "phase1": {"steps": 1, "lr": 2.0, "adam_eps": 1.0}, "phase2": {"steps": 1}}
    with pytest.raises(UserError, match=r"\(and 2 more\)"):
        find(config_of(tmp_path, **many))


def test_what_a_resumed_run_may_change(tmp_path):
    leave_checkpoint(leave_run(tmp_path), 1, 10)
    changed = config_of(
        tmp_path, log_every=1, checkpoint_every=3, keep_checkpoints=9, data={"cache_dir": "z"}
    )
    assert find(changed) == ([1, 2], (1, 10), None)


def test_resume_from_another_directory(tmp_path):
    source = leave_run(tmp_path / "source")
    leave_checkpoint(source, 1, 10)
    assert find(config_of(tmp_path / "own", resume=str(source))) == ([1, 2], (1, 10), None)
    with pytest.raises(UserError, match="seed: 0 -> 5: give the same values"):
        find(config_of(tmp_path / "own", resume=str(source), seed=5))


def test_another_directory_that_is_finished_is_not_this_run_finished(tmp_path):
    source = leave_run(tmp_path / "source")
    leave_checkpoint(source, 2, 10)
    between = leave_phase1(source)
    leave_results(source)
    assert find(config_of(tmp_path / "own", resume=str(source))) == ([2], (2, 10), between)


def test_resume_from_a_directory_without_a_run_or_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=f"--resume {tmp_path / 'none'}: no run there"):
        find(config_of(tmp_path / "own", resume=str(tmp_path / "none")))
    with pytest.raises(UserError, match="no complete checkpoint"):
        find(config_of(tmp_path / "own", resume=str(leave_run(tmp_path / "source"))))


def test_a_resume_that_finds_only_damage_is_an_error(tmp_path):
    source = leave_run(tmp_path / "source")
    leave_checkpoint(source, 1, 10, sound=False)
    lines = []
    with pytest.raises(UserError, match="no complete checkpoint"):
        find(config_of(tmp_path / "own", resume=str(source)), lines.append)
    assert len(lines) == 1


def test_default_configuration_compares_equal_to_itself(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig(output_dir=str(tmp_path))))
    assert find(RunConfig(output_dir=str(tmp_path))) == ([1, 2], None, None)


def test_what_a_killed_conversion_left_is_removed_at_the_next_start(tmp_path):
    leave_run(tmp_path)
    leave_checkpoint(tmp_path, 1, 4)
    (tmp_path / "checkpoints" / ".universal" / "converted").mkdir(parents=True)
    assert find(config_of(tmp_path)) == ([1, 2], (1, 4), None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["phase1-step00000004"]


def test_another_directory_counts_until_this_one_has_something_to_go_on_from(tmp_path):
    """A requeued job repeats its whole command: also one that was killed before its own
    first checkpoint."""
    source, own = leave_run(tmp_path / "source"), tmp_path / "own"
    leave_checkpoint(source, 1, 10)
    leave_run(own)
    config = config_of(own, resume=str(source))
    assert find(config) == ([1, 2], (1, 10), None)
    leave_checkpoint(own, 1, 12)
    assert find(config) == ([1, 2], (1, 12), None)
    (own / "config.yaml").write_text(to_yaml(config_of(own, seed=3)))
    with pytest.raises(UserError, match=f"{own} holds a run with other values: seed: 3 -> 0"):
        find(config)


@pytest.mark.parametrize(("there", "asked"), [(1, "2"), (2, "1")])
def test_an_unfinished_phase_is_not_given_up_for_another(tmp_path, there, asked):
    leave_checkpoint(leave_run(tmp_path, phase=str(there)), there, 10)
    with pytest.raises(
        UserError,
        match=rf"holds a run in phase {there} \(step 10\): finish it \(--phase {there} or all\)",
    ):
        find(config_of(tmp_path, phase=asked))


def test_other_sentences_than_the_run_began_with_are_refused(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("a sentence\n" * 50)
    config = config_of(tmp_path / "run", data={"train_file": str(text)})
    leave_checkpoint(leave_run(tmp_path / "run", data={"train_file": str(text)}), 1, 10)
    (tmp_path / "run" / "data.json").write_text(json.dumps(data_of(config)))
    assert find(config) == ([1, 2], (1, 10), None)
    text.write_text("a sentencE\n" * 50)
    with pytest.raises(
        UserError, match=r"holds a run on other sentences: train\.txt: restore the files"
    ) as caught:
        find(config)
    assert "\n" not in str(caught.value)


def test_phase_2_counts_on_behind_the_phase_1_that_came_before_it(tmp_path):
    """Wherever that one ran."""
    settings = {"phase1": {"steps": 70}}

    def offset(**fields):
        config = config_of(tmp_path, **settings, **fields)
        return find_start(config, pytest.fail).phase(2, config).offset

    leave_checkpoint(leave_run(tmp_path, phase="2", **settings), 2, 3)
    assert offset(phase="2") == 0
    (record,) = tmp_path.glob("checkpoints/*/COMPLETE")
    record.write_text(json.dumps({"meta": {"steps_before": 40}, "files": {}}))
    assert offset(phase="2") == 40
    record.write_text(json.dumps({"meta": {}, "files": {}}))
    leave_phase1(tmp_path)
    assert offset(phase="2") == offset() == 70


def test_a_phase_continues_from_a_checkpoint_of_its_own(tmp_path):
    leave_checkpoint(leave_run(tmp_path), 1, 20)
    config = config_of(tmp_path)
    start = find_start(config, pytest.fail)
    first, second = start.phase(1, config), start.phase(2, config)
    assert (start.resumed(first).step, start.resumed(second)) == (20, None)


def test_resume_from_the_output_directory_itself(tmp_path):
    assert find(config_of(tmp_path, resume=str(tmp_path))) == ([1, 2], None, None)
    leave_checkpoint(leave_run(tmp_path), 1, 20)
    assert find(config_of(tmp_path, resume=str(tmp_path))) == ([1, 2], (1, 20), None)


def test_the_prior_begins_where_phase_2_ended(tmp_path):
    """Or at a checkpoint of its own; alone, it needs a model."""
    settings = {"phase": "2+prior", "phase2": {"steps": 30}, "prior": {"steps": 5}}
    leave_checkpoint(leave_run(tmp_path, **settings), 2, 30)
    config = config_of(tmp_path, **settings)
    assert find(config) == ([2, 3], (2, 30), None)
    between = tmp_path / "phase2" / "model"
    between.mkdir(parents=True)
    assert find(config) == ([3], None, between)
    start = find_start(config, pytest.fail)
    assert start.phase(3, config).offset == 30
    leave_checkpoint(tmp_path, 3, 2)
    assert find(config) == ([3], (3, 2), between)
    leave_results(tmp_path)  # of an autoencoder alone
    assert find(config) == ([3], (3, 2), between)
    (tmp_path / "model" / "config.json").write_text('{"denoiser": {"width": 8}}')
    assert find(config) == ([], None, None)
    with pytest.raises(UserError, match="--model"):
        find(config_of(tmp_path / "other", phase="prior"))
