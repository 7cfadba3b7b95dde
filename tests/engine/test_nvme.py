"""Offload to a disk: what is refused before anything depends on it, and where gradients
are cut."""

import contextlib
import os
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsvae.engine import nvme
from dsvae.errors import EXIT_DISK, RunStopped, UserError
from dsvae.parallel.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def resolved(path, stage=3, zero=(), **options):
    section = {"device": "nvme", "nvme_path": str(path), **options}
    zero = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, **dict(zero)}
    return {
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": section,
            "offload_param": {**section},
            **zero,
        }
    }


@pytest.fixture
def compiled(monkeypatch):
    """DeepSpeed's I/O taken for compiled, and the disk for tried."""
    monkeypatch.setattr(nvme, "_compile", lambda: None)
    monkeypatch.setattr(nvme, "_try", lambda *_: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nvme_path": None}, "nvme_path must name a directory"),
        ({"fast_init": True}, "fast_init"),
        ({"stage": 2}, "needs stage 3"),
        ({"zero": {"stage3_prefetch_bucket_size": 10}}, "stage3_prefetch_bucket_size must be 0"),
        (
            {"zero": {"stage3_max_reuse_distance": 1e8}},
            r"stage3_max_reuse_distance must be 0 with weights on a disk, not 1e\+08",
        ),
        ({"path": "not there"}, "not there is not a directory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change, message, tmp_path, compiled):
    config = resolved(tmp_path / change.pop("path", "."), **change)
    with pytest.raises(UserError, match=message) as caught, nvme.place(config, "run", ALONE):
        pass
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("toolkit", "error", "message"),
    [
        (None, None, "CUDA toolkit.*CUDA_HOME"),
        ("/usr/local/cuda", TypeError("expected str, not NoneType"), "expected str"),
        ("/usr/local/cuda", RuntimeError("nvcc fatal\n  at line 3"), "nvcc fatal$"),
    ],
)
def test_io_that_does_not_compile_is_one_line(toolkit, error, message, tmp_path, monkeypatch):
    class Builder:
        def is_compatible(self, verbose):
            return True

        def load(self, verbose):
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvme, "CUDA_HOME", toolkit)
    monkeypatch.setattr(nvme, "AsyncIOBuilder", Builder)
    with (
        pytest.raises(UserError, match=message) as caught,
        nvme.place(resolved(tmp_path), "run", ALONE),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path, compiled, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nvme.Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match=f"{tmp_path}.*Permission denied"),
        nvme.place(resolved(tmp_path), "run", ALONE),
    ):
        pass


def where(config):
    (path,) = {
        section["nvme_path"]
        for name, section in config["zero_optimization"].items()
        if name.startswith("offload")
    }
    return path


def test_runs_have_directories_of_their_own_and_leave_none(tmp_path, compiled):
    one, two, again = (resolved(tmp_path) for _ in range(3))
    with nvme.place(one, "one", ALONE), nvme.place(two, "two", ALONE):
        assert where(one) != where(two)
        assert {str(path) for path in tmp_path.iterdir()} == {where(one), where(two)}
    assert list(tmp_path.iterdir()) == []
    os.makedirs(where(one))
    (tmp_path / where(one) / "left.swp").write_text("of a killed run")
    with contextlib.suppress(RunStopped), nvme.place(again, "one", ALONE):
        assert where(again) == where(one)
        assert os.listdir(where(one)) == []
        raise RunStopped(75, "told to stop")
    assert list(tmp_path.iterdir()) == []


def test_the_first_rank_of_each_node_has_the_directories(tmp_path, compiled, monkeypatch):
    """Whatever LOCAL_RANK says, which is 0 everywhere where each rank sees one GPU."""

    class Rank(World):
        def gather(self, value):
            return HOSTS if value in HOSTS else [value]

    found = {}
    for rank, host in enumerate(HOSTS):
        made: list = []
        monkeypatch.setattr(nvme.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(nvme, "_make", lambda path, made=made: made.append(path))
        config = resolved(tmp_path)
        with nvme.place(config, "run", Rank(rank, 0, 4, torch.device("cpu"))):
            Path(where(config)).mkdir()
        found[rank] = (bool(made), Path(where(config)).exists())
        shutil.rmtree(where(config), ignore_errors=True)
        monkeypatch.undo()
        monkeypatch.setattr(nvme, "_compile", lambda: None)
        monkeypatch.setattr(nvme, "_try", lambda *_: None)
    # (made, still there): ranks 1 and 3 leave what their nodes' first ranks have made
    assert found == {0: (True, False), 1: (False, True), 2: (True, False), 3: (False, True)}


HOSTS = ["node1", "node1", "node2", "node2"]


def test_a_disk_without_room_stops_the_run_before_it_begins(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 500, bias=False)
    usage = namedtuple("usage", "free")
    config = resolved(tmp_path)
    # Float32 weights, gradients, two moments, and the weights once more: 20 bytes each.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(20 * 500_000))
    nvme.make_room(config, model, ALONE)
    assert config["zero_optimization"]["offload_param"]["buffer_size"] == 500_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(20 * 500_000 - 1))
    with pytest.raises(RunStopped, match="0.0 GB are free: make room") as caught:
        nvme.make_room(config, model, ALONE)
    assert caught.value.code == EXIT_DISK


def test_gradients_that_pass_through_the_disk_begin_and_end_at_aligned_elements():
    unit, least = 256, 2_000
    swapper = SimpleNamespace(
        numel_alignment=unit, is_swappable_tensor=lambda numel: numel >= least
    )
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 255, 256, 2_000, 2_511, 2_512, 5_000, 4_096, 10_001, 7]
    gradients = [torch.rand(size, generator=generator) for size in sizes]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    parts, places = nvme._aligned_parts(swapper, gradients, offsets)
    flat = torch.full((sum(sizes),), torch.nan)
    large = 0
    for part, place in zip(parts, places, strict=True):
        assert flat[place : place + len(part)].isnan().all()
        flat[place : place + len(part)] = part
        if len(part) >= least and (place % unit == 0 and len(part) % unit == 0):
            large += len(part)
        else:
            assert len(part) < least + 2 * unit
    assert torch.equal(flat, torch.cat(gradients))
    assert large > 0.8 * len(flat)
