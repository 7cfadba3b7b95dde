"""A release that renamed what dsvae replaces or calls is refused before a run."""

import importlib
import signal
import subprocess
import sys
import types

import pytest
import torch
from launch import ROOT
from transformers.integrations import sdpa_attention

from dsvae import pretrained, private_names, train
from dsvae.errors import EXIT_USER_ERROR, UserError
from dsvae.export import export_checkpoint

NAMES = private_names.TRANSFORMERS + private_names.DEEPSPEED


def place(name):
    """The object that has the attribute, and the attribute."""
    module, _, path = name.path.partition(":")
    owner = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    return owner, attribute


def refusal(names=NAMES):
    with pytest.raises(UserError) as caught:
        private_names.check(names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_installed_releases_fit():
    private_names.check()


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.path} {name.mentions[:1]}")
def test_a_name_that_is_gone_is_refused(name, monkeypatch):
    owner, attribute = place(name)
    if attribute == "__compatible_ops__":  # made anew whenever it is missing
        monkeypatch.delattr(owner, "__getattr__")
    for each in getattr(owner, "__mro__", [owner]):  # it may be inherited
        if attribute in vars(each) and each is not torch.nn.Module:
            monkeypatch.delattr(each, attribute)
    package = name.path.partition(".")[0].partition(":")[0]
    line = refusal((name,))
    assert line.startswith(f"{package} ")
    assert name.path.replace(":", ".") in line
    assert attribute == "forward" or "does not exist" in line


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.parameters], ids=lambda name: name.path
)
def test_another_signature_is_refused(name, monkeypatch):
    owner, attribute = place(name)

    def replace(parameters):
        scope = {}
        exec(f"def changed({', '.join(parameters)}, **others): pass", scope)
        monkeypatch.setattr(owner, attribute, scope["changed"])
        return refusal((types.SimpleNamespace(path=name.path, problem=bare.problem),))

    bare = private_names.Name(name.path, name.parameters)
    *others, last = name.parameters
    assert f"has no parameter {last}" in replace([*others, "renamed"])
    assert "has another required parameter, more" in replace([*name.parameters, "more"])


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if name.mentions],
    ids=lambda name: f"{name.path} {name.mentions[:1]}",
)
def test_a_function_that_no_longer_uses_a_name_is_refused(name, monkeypatch):
    """What is put under that name would never be called."""
    owner, attribute = place(name)
    arguments = ", ".join((*(name.parameters or ()), "*", "unused=None", "**others"))
    scope = {}
    exec(f"def changed({arguments}): pass", scope)
    monkeypatch.setattr(owner, attribute, scope["changed"])
    assert f"does not use {name.mentions[0]}" in refusal((name,))


def test_a_run_does_not_start(monkeypatch, capsys):
    def attention(module, query, key, value, attention_mask, is_causal=None, bias=None, **kwargs):
        """T5's `position_bias` would be lost in `kwargs`."""

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", attention)
    settings = types.SimpleNamespace(ds_config="x.json", hang_timeout=1.0)
    monkeypatch.setattr(train.configuration, "read", lambda _: settings)
    monkeypatch.setattr(train.ds_config, "load", lambda _: {})
    monkeypatch.setattr(train, "join", lambda _: pytest.fail("the run has started"))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        assert train.main([]) == EXIT_USER_ERROR
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsvae: error: transformers ")
    assert "sdpa_attention_forward has no parameter position_bias" in line


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, *_):
        if name == "{hidden}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
{start}
"""
CLI = "from dsvae.cli import main; sys.exit(main({words}))"


@pytest.mark.parametrize(
    ("hidden", "start"),
    [
        ("deepspeed.checkpoint.ds_to_universal", "import dsvae.train"),
        ("deepspeed.runtime.zero.config", "import dsvae.train"),
        ("transformers.utils.hub", "import dsvae.train"),
        ("deepspeed.utils.zero_to_fp32", CLI.format(words="['export', 'run']")),
        ("deepspeed.runtime.zero.config", CLI.format(words="['plan', 't5-small']")),
    ],
)
def test_a_module_that_has_moved_is_one_line(hidden, start):
    code = HIDE.format(hidden=hidden, start=start)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == EXIT_USER_ERROR
    lines = [line for line in result.stderr.splitlines() if line.startswith("dsvae: error: ")]
    package = hidden.partition(".")[0]
    assert len(lines) == 1
    assert lines[0].startswith(f"dsvae: error: {package} ")
    assert f"{hidden} does not exist" in lines[0]
    assert "Traceback" not in result.stderr


def test_a_module_that_is_none_of_theirs_stays_a_traceback():
    code = HIDE.format(hidden="datasets", start="import dsvae.train")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 1
    assert "No module named 'datasets'" in result.stderr


def test_a_checkpoint_is_not_exported(monkeypatch, tmp_path):
    monkeypatch.delattr(sdpa_attention, "sdpa_attention_forward")
    with pytest.raises(UserError, match="sdpa_attention_forward does not exist"):
        export_checkpoint(tmp_path, "latest", None, print)


def test_a_model_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.delattr(sdpa_attention, "sdpa_attention_forward")
    with pytest.raises(UserError, match="sdpa_attention_forward does not exist"):
        pretrained.load(tmp_path)
