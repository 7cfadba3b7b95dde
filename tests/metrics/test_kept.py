"""An evaluation that is interrupted again and again does its work once, and ends with
the numbers of an uninterrupted one."""

import pytest
import torch
from small_models import SMALL, make_vae, small_tokenizer

from dsvae.data.grammar import generate
from dsvae.data.record_tokens import tokenize
from dsvae.errors import RunStopped
from dsvae.inference.kept import Kept
from dsvae.inference.passes import Passes
from dsvae.metrics import evaluate as metrics
from dsvae.parallel.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))
SENTENCES = [drawn.text for drawn in generate(60, seed=3)]


def evaluate(model, split, kept=None, token_budget=128):
    """The metrics of two samples of z, and of three for the bound."""
    passes = Passes(model, ALONE, token_budget=token_budget, kept=kept)
    return metrics.evaluate(passes, split, samples=2, iw_samples=3)[0]


@pytest.fixture(scope="module")
def split():
    return tokenize(SENTENCES, small_tokenizer(SENTENCES, SMALL["vocab_size"]), 64, "test")[0]


class Counting:
    """A model that counts its forward passes."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_hook(self._add)
        self.model = model

    def _add(self, *_):
        self.count += 1


def cut_every(batches):
    """Stops at every batch of that number, as a signal would."""
    asked = {"times": 0}

    def stop():
        asked["times"] += 1
        return RunStopped(75, "cut") if asked["times"] % batches == 0 else None

    return stop


@pytest.mark.parametrize("batches", [1, 3])
def test_cut_every_few_batches(batches, split, tmp_path):
    counting = Counting(make_vae())
    uncut = evaluate(counting.model, split)
    needed, counting.count = counting.count, 0
    stop, starts, found = cut_every(batches), 0, None
    while found is None:
        starts += 1
        kept = Kept(tmp_path / "kept", "these weights", ALONE, stop)
        try:
            found = evaluate(counting.model, split, kept)
        except RunStopped:
            assert starts <= needed
    assert found == uncut
    assert counting.count == needed >= 20
    assert starts == needed // batches + 1
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_what_other_weights_gave_is_not_taken_over(split, tmp_path):
    """Results of another batch size are not reused: their sums may differ in the last bit."""
    first, second = make_vae(), make_vae()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)

    def of(model, name, **options):
        kept = Kept(tmp_path / "kept", name, ALONE, lambda: None)
        return evaluate(model, split, kept, **options)

    assert of(first, "first") == evaluate(first, split)
    counting = Counting(first)
    of(first, "first")
    assert counting.count == 0
    of(first, "first", token_budget=256)
    assert counting.count > 0
    assert of(second, "second") == evaluate(second, split)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_disk_that_takes_nothing_changes_no_number(split, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    model = make_vae()
    kept = Kept(tmp_path / "kept", "these weights", ALONE, lambda: None)
    found = evaluate(model, split, kept)
    assert found == evaluate(model, split)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
