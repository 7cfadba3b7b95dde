"""Which checkpoints are taken for complete and sound, on directories made by hand."""

import hashlib
import json

import pytest

from dsvae.engine.checkpoint import COMPLETE, damage, find, newest_sound, prune

FILES = {
    "model.pt": b"weights" * 9,
    "ranks/0.pt": b"state of rank 0",
    "ranks/1.pt": b"state of rank 1",
}


def make(root, phase, step, complete=True, meta=None):
    directory = root / f"phase{phase}-step{step:08d}"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    if complete:
        files = {
            name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()}
            for name, c in FILES.items()
        }
        (directory / COMPLETE).write_text(json.dumps({"meta": meta or {}, "files": files}))
    return directory


def found(root):
    return [(checkpoint.phase, checkpoint.step) for checkpoint in find(root)]


def test_ordered_by_phase_then_step(tmp_path):
    for phase, step in ((2, 5), (1, 900), (2, 40), (1, 7)):
        make(tmp_path, phase, step)
    assert found(tmp_path) == [(1, 7), (1, 900), (2, 5), (2, 40)]


def test_without_the_marker_and_under_other_names_nothing_is_found(tmp_path):
    make(tmp_path, 1, 10)
    make(tmp_path, 1, 20, complete=False)
    make(tmp_path, 1, 30).rename(tmp_path / "phase1-step00000030.old")
    make(tmp_path, 1, 40).rename(tmp_path / "global_step40")
    # DeepSpeed's own pointer does not count
    (tmp_path / "latest").write_text("phase1-step00000020")
    assert found(tmp_path) == [(1, 10)]


def test_nothing_there(tmp_path):
    assert find(tmp_path) == []
    assert find(tmp_path / "none") == []
    assert newest_sound(tmp_path / "none", pytest.fail) is None


def test_a_sound_checkpoint_has_no_damage_and_its_meta(tmp_path):
    make(tmp_path, 1, 10, meta={"world_size": 2, "zero_stage": 3})
    (checkpoint,) = find(tmp_path)
    assert damage(checkpoint) is None
    assert checkpoint.meta == {"world_size": 2, "zero_stage": 3}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("harm", [truncate, empty, grow, flip, lambda path: path.unlink()])
def test_damage_names_the_file(tmp_path, name, harm):
    harm(make(tmp_path, 1, 10) / name)
    (checkpoint,) = find(tmp_path)
    assert str(checkpoint.directory / name) in damage(checkpoint)


def test_the_newest_sound_one_is_taken_and_the_damaged_are_named(tmp_path):
    make(tmp_path, 1, 10)
    make(tmp_path, 1, 20)
    flip(make(tmp_path, 1, 30) / "model.pt")
    (make(tmp_path, 2, 5) / "ranks/1.pt").unlink()
    make(tmp_path, 2, 6, complete=False)
    lines = []
    checkpoint = newest_sound(tmp_path, lines.append)
    assert (checkpoint.phase, checkpoint.step) == (1, 20)
    assert len(lines) == 2
    assert "phase2-step00000005/ranks/1.pt is missing" in lines[0]
    assert "phase1-step00000030/model.pt does not match" in lines[1]


def test_with_all_of_them_damaged_there_is_none(tmp_path):
    truncate(make(tmp_path, 1, 10) / "model.pt")
    lines = []
    assert newest_sound(tmp_path, lines.append) is None
    assert len(lines) == 1


def test_the_newest_and_the_best_of_the_running_phase_stay(tmp_path):
    for phase, step, valid in (
        (1, 10, 0.5),
        (2, 10, 9.0),
        (2, 20, 7.0),
        (2, 30, None),
        (2, 40, 8.0),
        (2, 50, 8.5),
    ):
        make(tmp_path, phase, step, meta={"valid": valid})
    make(tmp_path, 2, 60, complete=False)
    prune(tmp_path, 2, keep_best=True)
    assert found(tmp_path) == [(2, 20), (2, 40), (2, 50)]
    assert (tmp_path / "phase2-step00000060").exists()  # another rank may be writing it
    prune(tmp_path, 1, keep_best=False)
    assert found(tmp_path) == [(2, 50)]


def test_without_values_on_validation_text_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, 1, step, meta={"valid": None})
    prune(tmp_path, 1, keep_best=True)
    assert found(tmp_path) == [(1, 3)]
