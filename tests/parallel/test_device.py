"""The device of a process."""

import pytest
import torch

from dsvae.errors import UserError
from dsvae.generation.sentence_vae import find_device
from dsvae.parallel import device
from dsvae.parallel.world import join

CPU = torch.device("cpu")


@pytest.fixture
def unusable(monkeypatch, tmp_path):
    """A machine with a GPU that torch does not see."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


@pytest.mark.parametrize("start", [join, lambda: find_device(None)], ids=["a run", "dsvae"])
def test_a_gpu_that_torch_cannot_use_is_refused_in_one_line(start, unusable):
    with pytest.raises(UserError, match="driver.*DS_ACCELERATOR=cpu") as caught:
        start()
    assert str(unusable) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", "")]
)
def test_the_cpu_is_taken_where_it_is_asked_for(name, value, unusable, monkeypatch):
    monkeypatch.setenv(name, value)
    assert device.local_device() == CPU


def test_the_cpu_is_taken_where_there_is_no_gpu(unusable):
    unusable.unlink()
    assert device.local_device(3) == CPU


def test_a_gpu_is_taken_by_the_number_of_the_rank_and_without_cudnn_attention(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert device.local_device(3) == torch.device("cuda", 3)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_device_is_described_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert device.describe(torch.device("cuda", 1)) == "NVIDIA H200 (cuda:1)"
    assert device.describe(CPU).startswith("CPU ")
