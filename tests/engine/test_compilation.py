"""What `--compile` needs is looked for before anything is built."""

import shutil

import pytest
import torch

from dsvae.engine import compilation
from dsvae.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine with compilers and Python's headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation.sysconfig, "get_config_var", lambda _: str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def refused(device, stage=2):
    with pytest.raises(UserError) as caught:
        compilation.check(stage, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_complete_machine_compiles_below_zero_3(device, complete):
    compilation.check(2, device)
    assert "ZeRO 3" in refused(device, 3)


@pytest.mark.parametrize(
    ("device", "variable", "names"),
    [(CPU, "CXX", ["g++"]), (GPU, "CC", ["clang", "gcc"])],
)
def test_a_missing_compiler_is_named(device, variable, names, complete, monkeypatch):
    for name in names:
        monkeypatch.setattr(shutil, "which", lambda each, name=name: each if each == name else None)
        compilation.check(2, device)
        monkeypatch.setenv(variable, "mine")
        assert "no mine" in refused(device)
        monkeypatch.delenv(variable)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert " or ".join(names) in refused(device)


def test_missing_headers_of_python_are_named_on_a_gpu_alone(complete):
    (complete / "Python.h").unlink()
    compilation.check(2, CPU)
    assert str(complete / "Python.h") in refused(GPU)
