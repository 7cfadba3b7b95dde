"""Sentences from the prior by flow matching: against the denoiser used directly."""

import math

import numpy as np
import pytest
import torch
from small_models import make_vae, small_tokenizer

from dsvae import cli
from dsvae.data.noise import FLOW, normal
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, fitted_prior
from dsvae.hub import package

TEXTS = ["a bad bee", "abe", "he had the beach ball cab bad bed", "each ace bathed", "a tea"]
K, D = 4, 6
COUNTS = [3, 0, 5, 2]
OF_CLASS = [[0, 0, 1, 0], [1, 0, 0, 0]]
FEW = {"max_new_tokens": 7}
SHAPE = {"injection": "cross", "pooling": "chunks", "chunk": 3, "latent_vectors": K}


def make(**more):
    fields = {"width": 32, "layers": 2, "conditional": bool(more.get("conditional"))}
    if not fields["conditional"]:
        fields |= {"classes": ["bad", "good"], "class_vector_counts": OF_CLASS}
    given = {**SHAPE, "memory_slots": 1, "vector_counts": COUNTS, "denoiser": fields, **more}
    model = make_vae(**given)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.normal_(0, 0.2)
        model.denoiser.mean.normal_()
        model.denoiser.std.uniform_(0.5, 2)
    return SentenceVAE(model, small_tokenizer(TEXTS * 3, 60), batch_size=3)


@pytest.fixture(scope="module")
def vae():
    return make()


def by_hand(vae, count, steps, label=None, guidance=1.0, counts=COUNTS, heun=False):
    """The same texts by a loop over each sample alone."""
    model, texts = vae.model, []
    for number in range(count):
        noise = torch.from_numpy(normal(1, FLOW, [(0, number)], K * D + 1))
        share = float(torch.special.ndtr(noise[0, -1].double()))
        ends = np.cumsum(counts[::-1])[::-1] / sum(counts)  # P(at least k)
        n = sum(1 for chance in ends if chance > share)
        valid = torch.ones(1, n, dtype=torch.bool)
        u, estimate = noise[:, :-1].view(1, K, D)[:, :n], None

        def velocity(u, t, estimate, valid=valid):
            given = (u, torch.tensor([t]), valid)
            plain = model.denoiser(*given, estimate=estimate)
            if label is None:
                return plain
            own = model.denoiser(*given, estimate=estimate, labels=torch.tensor([label]))
            return plain + guidance * (own - plain)

        with torch.no_grad():
            for step in range(steps):
                t = step / steps
                v = velocity(u, t, estimate)
                estimate = u + (1 - t) * v
                if heun:
                    v = (v + velocity(u + v / steps, t + 1 / steps, estimate)) / 2
                u = u + v / steps
        std, mean = (each.view(K, D)[:n] for each in (model.denoiser.std, model.denoiser.mean))
        z = torch.zeros(1, K, D)
        z[:, :n] = u * std + mean
        texts += vae.decode(z, valid=torch.arange(K)[None] < n, **FEW)
    return texts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 5}, {"steps": 5}),
        ({"steps": 3, "solver": "heun"}, {"steps": 3, "heun": True}),
        (
            {"steps": 4, "label": "good", "guidance": 3.0},
            {"steps": 4, "label": 1, "guidance": 3.0, "counts": OF_CLASS[1]},
        ),
    ],
)
def test_samples_are_those_of_a_loop_whatever_the_batch(vae, given, expected):
    texts = vae.sample(7, source="flow", seed=1, **given, **FEW)
    assert texts == by_hand(vae, 7, **expected)
    assert len(set(texts)) > 3
    assert vae.sample(4, source="flow", seed=1, **given, **FEW) == texts[:4]
    assert vae.sample(7, source="flow", seed=2, **given, **FEW) != texts


def test_numbers_of_vectors_come_from_the_training_texts(vae):
    noise = torch.randn(2000, K * D + 1)
    for label, counts in ((None, COUNTS), (0, OF_CLASS[0])):
        z = vae.passes.draw_latents(vae.model.denoiser, noise, None, steps=1, label=label)
        numbers = (z.view(-1, K, D) != 0).any(-1).sum(1)
        found = torch.bincount(numbers, minlength=K + 1)[1:] / len(noise)
        expected = torch.tensor(counts) / sum(counts)
        torch.testing.assert_close(found, expected, atol=4 / math.sqrt(len(noise)), rtol=0)


def test_a_condition_is_followed():
    vae = make(conditional=True, prior="fixed", chunk=6)
    texts = {c: vae.sample(4, source="flow", seed=1, condition=c, **FEW) for c in TEXTS[:2]}
    assert len(set(map(tuple, texts.values()))) == 2
    given = {"source": "flow", "seed": 1, "condition": TEXTS[0]}
    assert vae.sample(4, guidance=1.0, **given, **FEW) == texts[TEXTS[0]]
    assert vae.sample(4, guidance=4.0, **given, **FEW) != texts[TEXTS[0]]


def test_a_package_has_the_prior(vae, tmp_path):
    for part in (vae.model, vae.tokenizer):
        part.save_pretrained(tmp_path / "model")
    packed = package(str(tmp_path / "model"), tmp_path / "packed")
    assert (packed / "denoiser.py").is_file()
    loaded = SentenceVAE.from_pretrained(str(packed), device="cpu", batch_size=3)
    given = {"source": "flow", "seed": 1, "steps": 3, **FEW}
    assert loaded.sample(3, **given) == vae.sample(3, **given)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"steps": 3}, "steps"),
        ({"source": "flow", "label": "goof"}, "did you mean good"),
        ({"source": "flow", "guidance": 2.0}, "guidance"),
        ({"source": "flow", "steps": 0}, "steps"),
        ({"source": "flow", "solver": "rk4"}, "solver"),
        ({"source": "flow", "texts": TEXTS}, "flow"),
        ({"source": "aggregate"}, "texts"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(vae, given, word):
    with pytest.raises(UserError, match=word) as caught:
        vae.sample(2, **given)
    assert "\n" not in str(caught.value)


def test_a_model_without_such_a_prior_says_how_to_train_one():
    vae = SentenceVAE(make_vae(**SHAPE, memory_slots=1), small_tokenizer(TEXTS * 3, 60))
    with pytest.raises(UserError, match="--phase prior"):
        vae.sample(2, source="flow")
    with pytest.raises(UserError, match="--phase prior"):
        fitted_prior.check(vae)


def test_the_command_gives_the_same_texts(vae, tmp_path, capsys):
    vae.model.save_pretrained(tmp_path)
    vae.tokenizer.save_pretrained(tmp_path)
    flags = ["--n", "3", "--seed", "1", "--steps", "4", "--label", "good", "--guidance", "3"]
    few = ["--max_new_tokens", "7", "--device", "cpu"]
    assert cli.main(["sample", str(tmp_path), "--source", "flow", *flags, *few]) == 0
    expected = by_hand(vae, 3, 4, label=1, guidance=3.0, counts=OF_CLASS[1])
    shown = [line[3:] for line in capsys.readouterr().out.splitlines()]
    assert shown == [text.strip() for text in expected] or shown == expected
    assert cli.main(["sample", str(tmp_path), *flags, *few]) == 2
