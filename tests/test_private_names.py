"""A release that renamed what dsvae replaces or calls is refused before a run."""

import importlib
import signal
import types

import pytest
import torch
from transformers.integrations import sdpa_attention

from dsvae import pretrained, private_names, train
from dsvae.errors import EXIT_USER_ERROR, UserError

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


def test_a_model_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.delattr(sdpa_attention, "sdpa_attention_forward")
    with pytest.raises(UserError, match="sdpa_attention_forward does not exist"):
        pretrained.load(tmp_path)
