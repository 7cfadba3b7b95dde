"""Saving by two ranks, which are threads here: whatever goes wrong on one of them, both
leave with the same line, and nothing is lost."""

import errno
import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from dsvae.engine import checkpoint
from dsvae.engine.checkpoint import COMPLETE, SaveFailed, damage, find, save

SECONDS = 10
"""After which a rank that waits for the other one gives up."""


class Ranks:
    """Where the threads meet."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.values = [None] * size
        self.kind = [None] * size

    def gather(self, rank, kind, value):
        self.values[rank], self.kind[rank] = value, kind
        self.barrier.wait()
        values, kinds = list(self.values), set(self.kind)
        self.barrier.wait()
        assert len(kinds) == 1, f"ranks in different operations: {kinds}"
        return values


class World:
    def __init__(self, rank, ranks):
        self.rank, self.size, self.ranks, self.is_main = rank, ranks.size, ranks, rank == 0

    def gather(self, value):
        return self.ranks.gather(self.rank, "gather", value)

    def run_on_rank0(self, function):
        box = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except OSError as error:
                box[1] = error
        result, error = self.ranks.gather(self.rank, "broadcast", box)[0]
        if error is not None:
            raise error
        return result

    def heartbeat(self, where):
        pass

    def suspend_hang_detection(self):
        return nullcontext()


class Engine:
    """Writes as DeepSpeed's does, with its barriers."""

    def __init__(self, world):
        self.world = world
        self.checkpoint_engine = TorchCheckpointEngine()

    def _barrier(self):
        self.world.ranks.gather(self.world.rank, "barrier of DeepSpeed", None)

    def save_checkpoint(self, root, tag, client_state, save_latest):
        assert not save_latest
        if self.world.is_main:
            self.checkpoint_engine.makedirs(root, exist_ok=True)
        self._barrier()
        if self.world.is_main:
            self.checkpoint_engine.save(client_state, f"{root}/{tag}/model_states.pt")
        self.checkpoint_engine.save(client_state, f"{root}/{tag}/rank{self.world.rank}_optim.pt")
        if self.world.is_main:
            self._copy_recovery_script(root)
        self._barrier()

    def _copy_recovery_script(self, path):
        Path(path, "zero_to_fp32.py").write_text("print()")


def save_on_both(root, step, meta=None, keep=2):
    """What each of two ranks got: a checkpoint or an exception."""
    ranks, found = Ranks(2), [None, None]
    lines = []

    def rank(number):
        world = World(number, ranks)
        options = {"meta": meta or {}, "keep": keep, "keep_best": False}
        try:
            found[number] = save(
                Engine(world), world, root, phase=1, step=step, **options, report=lines.append
            )
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,), name=str(number)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * SECONDS)
    return found, lines


def test_both_ranks_files_are_recorded_whatever_a_listing_shows(tmp_path, monkeypatch):
    """On a network file system a listing may be older than what another node wrote."""
    monkeypatch.setattr(Path, "rglob", lambda *_: iter(()))
    found, lines = save_on_both(tmp_path, 5, {"valid": 1.0})
    (complete,) = find(tmp_path)
    assert found == [complete, complete]
    assert lines == []
    assert complete.meta == {"valid": 1.0}
    assert damage(complete) is None
    files = json.loads((complete.directory / COMPLETE).read_text())["files"]
    assert set(files) == {"model_states.pt", "rank0_optim.pt", "rank1_optim.pt"}
    assert (tmp_path / "latest").read_text() == "phase1-step00000005"


def failing(function, rank, when=lambda *_: True):
    """The function, which on one rank finds no room."""

    def maybe(*args, **kwargs):
        if threading.current_thread().name == str(rank) and when(*args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    return maybe


@pytest.mark.parametrize(
    ("where", "name", "rank"),
    [
        (checkpoint, "_sha256", 0),
        (checkpoint, "_sha256", 1),
        (TorchCheckpointEngine, "save", 1),
        (TorchCheckpointEngine, "makedirs", 0),
        (Engine, "_copy_recovery_script", 0),
        (checkpoint, "write_text", 0),
        (Path, "mkdir", 0),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_the_save_on_both(
    where, name, rank, tmp_path, monkeypatch
):
    save_on_both(tmp_path, 5)
    monkeypatch.setattr(where, name, failing(getattr(where, name), rank))
    found, lines = save_on_both(tmp_path, 9)
    monkeypatch.undo()
    assert [type(each) for each in found] == [SaveFailed, SaveFailed], found
    assert str(found[0]) == str(found[1])
    assert "phase1-step00000009 cannot be written" in str(found[0])
    assert "No space left on device" in str(found[0])
    assert lines == []
    assert not (tmp_path / "phase1-step00000009").exists()
    (before,) = find(tmp_path)
    assert (before.step, damage(before)) == (5, None)
    assert (tmp_path / "latest").read_text() == "phase1-step00000005"


@pytest.mark.parametrize(
    ("where", "name", "when"),
    [
        (shutil, "rmtree", lambda path, *_: "00000001" in str(path)),
        (checkpoint, "write_text", lambda path, *_: path.name == "latest"),
    ],
)
def test_what_goes_wrong_behind_a_complete_checkpoint_is_a_warning(
    where, name, when, tmp_path, monkeypatch
):
    for step in (1, 2):
        save_on_both(tmp_path, step)
    monkeypatch.setattr(where, name, failing(getattr(where, name), 0, when))
    found, lines = save_on_both(tmp_path, 3)
    monkeypatch.undo()
    assert [each.step for each in found] == [3, 3]
    assert damage(found[0]) is None
    assert len(lines) == 2  # of both ranks: rank 0 alone prints
    assert lines[0].startswith(
        f"warning: checkpoint {tmp_path / 'phase1-step00000003'} is complete"
    )
    assert "No space left on device" in lines[0]


def test_one_that_cannot_be_removed_keeps_none_of_the_others(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_on_both(tmp_path, step, keep=3)
    stuck = failing(shutil.rmtree, 0, lambda path, *_: "00000001" in str(path))
    monkeypatch.setattr(shutil, "rmtree", stuck)
    save_on_both(tmp_path, 4, keep=1)
    monkeypatch.undo()
    assert [each.step for each in find(tmp_path)] == [4]
    assert not (tmp_path / "phase1-step00000002").exists()
