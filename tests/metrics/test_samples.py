"""Numbers of generated texts, by hand, by scipy, by plain loops and by mauve-text; and the
command that measures them."""

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy, wasserstein_distance
from small_models import make_vae, small_tokenizer

from dsvae.cli import main
from dsvae.data.grammar import FACTORS, generate
from dsvae.data.record_tokens import tokenize
from dsvae.generation import SentenceVAE
from dsvae.inference.passes import Passes
from dsvae.metrics import samples
from dsvae.metrics.catalog import METRICS
from dsvae.metrics.samples import NGrams

TEXTS = [drawn.text for drawn in generate(200, seed=8)]


def test_ngrams_are_interpolated_as_written():
    model = NGrams(["a b", "a c", "a b b"], ["a", "b", "c", "d"])
    words = sorted(model.vocabulary)
    assert words == ["</s>", "<unk>", "a", "b", "c", "d"]
    # By hand: 10 single words of 4 kinds, b 3 of them; after a: b, c, b; after </s> a the same.
    one = (3 + 4 / 6) / (10 + 4)
    two = (2 + 2 * one) / (3 + 2)
    three = (2 + 2 * two) / (3 + 2)
    assert model.probability(("</s>", "a"), "b") == pytest.approx(three)
    assert model.probability(("d", "a"), "b") == pytest.approx(two)  # d was never seen
    for history in product(words, repeat=2):
        total = sum(model.probability(history, word) for word in words)
        assert total == pytest.approx(1)
    first = model.probability(("</s>", "</s>"), "<unk>")
    last = model.probability(("</s>", "<unk>"), "</s>")
    assert model.perplexity(["e"])[0] == pytest.approx((first * last) ** -0.5)


def test_texts_against_the_known_distribution():
    """KLs by scipy, from the factors that the sentences were drawn with."""
    drawn = generate(200, seed=8)
    sizes = [len(values) for values in FACTORS.values()]

    def kl(*columns):
        counts = np.zeros([sizes[i] for i in columns])
        for each in drawn:
            counts[tuple(each.factors[i] for i in columns)] += 1
        return entropy(counts.ravel(), np.ones(counts.size))

    found = samples.of_grammar([*(each.text for each in drawn), "Kings admired.", ""])
    assert found["valid"] == pytest.approx(200 / 202)
    assert found["se"]["valid"] == pytest.approx(math.sqrt(200 * 2 / 202**2 / 201))
    assert found["factor_kl"] == pytest.approx(max(map(kl, range(9))))
    pairs = [kl(a, b) for a, b in product(range(9), repeat=2) if a < b]
    assert found["pair_kl"] == pytest.approx(max(pairs))
    found = samples.of_grammar(["Nothing."] * 3)
    assert found["valid"] == 0
    assert math.isnan(found["factor_kl"])


def jackknife(value, texts):
    """The standard error of `value(texts)`, by leaving each text out."""
    left = np.array([value(texts[:i] + texts[i + 1 :]) for i in range(len(texts))])
    return math.sqrt((len(texts) - 1) * left.var())


def test_unigram_entropy_is_that_of_scipy():
    def value(texts):
        return entropy(list(Counter(word for text in texts for word in text.split()).values()))

    found, se = samples.unigram_entropy(TEXTS)
    assert found == pytest.approx(value(TEXTS))
    assert se == pytest.approx(jackknife(value, TEXTS), rel=0.1)
    assert np.isnan(samples.unigram_entropy(["", ""])).all()


def test_distinct_ngrams_and_their_product_by_a_plain_loop():
    def share(texts, n):
        grams = [
            " ".join(text.split()[i : i + n])
            for text in texts
            for i in range(len(text.split()) - n + 1)
        ]
        return len(set(grams)) / len(grams)

    def diversity(texts):
        return share(texts, 2) * share(texts, 3) * share(texts, 4)

    some = TEXTS[:40]
    found = samples.distinct_of(some)
    for n in (1, 2, 3, 4):
        value, se = found[f"distinct_{n}"]
        assert value == pytest.approx(share(some, n))
        assert se == pytest.approx(jackknife(lambda texts, n=n: share(texts, n), some))
    assert found["diversity"][0] == pytest.approx(diversity(some))
    assert found["diversity"][1] == pytest.approx(jackknife(diversity, some))
    assert math.isnan(samples.distinct_of(["a b", "c"])["diversity"][0])


def test_memory_by_hand():
    training = ["a b c d e", "b c d x y", "p q r s"]
    rows = {
        # its 4-grams: abcd, bcdx, cdxy. One lies in the first text, two in the second.
        "one": ["a b c d x y", "p  q r s", "a b"],
        "none": ["", "new"],
    }
    found = samples.memory_of(rows, iter(training))
    assert found["one"]["memorisation"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["one"]["copies"] == pytest.approx(1 / 3)
    assert math.isnan(found["none"]["memorisation"])
    assert found["none"]["copies"] == 0
    twice = samples.memory_of({"x": ["a b c d a b c d"]}, ["a b c d"])["x"]
    assert twice["memorisation"] == pytest.approx(2 / 5)  # abcd bcda cdab dabc abcd


def test_the_distance_of_lengths_is_that_of_scipy():
    rng = np.random.default_rng(0)
    one, other = rng.poisson(8, 300), rng.poisson(11, 500)
    found, se = samples.wasserstein(one, other)
    assert found == pytest.approx(wasserstein_distance(one, other))
    drawn = [wasserstein_distance(rng.choice(one, 300), rng.choice(other, 500)) for _ in range(300)]
    assert se == pytest.approx(np.std(drawn), rel=0.2)
    assert samples.wasserstein(one, one)[0] == 0


def test_mauve_of_known_clusters():
    """Points of K far clusters: the histograms are the shares of the clusters, whatever
    k-means does."""
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    corners = np.eye(4, 6) * 50
    p, q = np.repeat([0, 1, 2, 3], [25, 5, 5, 5]), np.repeat([0, 1, 2, 3], [10, 10, 10, 10])
    features = [corners[each] + rng.normal(0, 0.01, (len(each), 6)) for each in (p, q)]
    value, se = samples.mauve(*features, seed=1)
    shares = np.array([25, 5, 5, 5]) / 40, np.array([1, 1, 1, 1]) / 4
    assert value == pytest.approx(samples.frontier(*shares), abs=1e-6)
    assert 0 < value < 0.9
    assert 0.01 < se < 0.3
    like = np.repeat([0, 1, 2, 3], [24, 6, 5, 5])
    near, _ = samples.mauve(corners[like] + rng.normal(0, 0.01, (40, 6)), features[0], seed=1)
    assert 0.95 < near < 1


def test_the_frontier_of_two_histograms():
    """Against an integral with many more points; equal and disjoint ones in closed form."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    points = []
    for w in np.linspace(0, 1, 20_001)[1:-1]:
        r = w * p + (1 - w) * q
        points.append((np.exp(-5 * entropy(q, r)), np.exp(-5 * entropy(p, r))))
    x, y = np.array(sorted([(0.0, 1.0), *points, (1.0, 0.0)])).T
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    assert samples.frontier(p, q) == pytest.approx(area, abs=5e-3)
    assert samples.frontier(p, p) == pytest.approx(1)
    apart = samples.frontier(np.array([1.0, 0]), np.array([0, 1.0]))
    # exp(-5 KL) is w^5 and (1 - w)^5: the area is 5 B(5, 6) = 1 / 252.
    assert apart == pytest.approx(1 / 252, abs=3e-3)


def test_without_the_package_there_is_no_mauve(monkeypatch):
    monkeypatch.setattr(samples, "has_mauve", lambda: False)
    assert np.isnan(samples.mauve(np.ones((50, 3)), np.ones((50, 3)), 0)).all()


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(TEXTS)


def test_a_language_model_reads_texts_as_a_plain_loop_does(tokenizer):
    model = make_vae(injection="none")
    reader = samples.Reader(Passes(model, token_budget=300), tokenizer)
    found, states = reader.read([*TEXTS[:9], " "])
    split = tokenize(TEXTS[:9], tokenizer, 512, "texts")[0]
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for i in range(9):
            ids = torch.from_numpy(split.ids(i))[None]
            out = model(labels=ids, latent=torch.zeros(1, 0), output_hidden_states=True)
            each = torch.log_softmax(out.logits[0], -1)[torch.arange(ids.shape[1]), ids[0]]
            nats, tokens = nats - float(each.sum()), tokens + ids.shape[1]
            logits = model.lm_head(states[i].float() * model.output_scale)
            torch.testing.assert_close(logits, out.logits[0, -1], atol=1e-3, rtol=1e-3)
    assert found["generative_ppl"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert (found["blank"], len(states)) == (1, 9)
    found, _ = reader.read(["", " "])
    assert math.isnan(found["generative_ppl"])
    assert found["blank"] == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Directories of a model and of a language model, and files of texts."""
    path = tmp_path_factory.mktemp("samples")
    denoiser = {"width": 16, "layers": 1}
    latents = {"model": {"latent_dim": 3, "denoiser": denoiser}, "lm": {"injection": "none"}}
    for name, latent in latents.items():
        make_vae(max_tokens=24, **latent).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "train.txt").write_text("".join(f"{text}\n" for text in TEXTS[:100]))
    (path / "test.txt").write_text("".join(f"{text}\n" for text in TEXTS[100:]))
    return path


def run(files, *words):
    given = ["--reference", str(files / "test.txt"), "--lm", str(files / "lm")]
    assert main(["evaluate_samples", *map(str, words), *given]) == 0


def test_samples_of_a_model_beside_their_baselines(files, tmp_path, capsys):
    train = ("--train_file", files / "train.txt")
    drawn = ("--source", "aggregate", "--samples", 30, "--max_new_tokens", 9)
    run(files, files / "model", *train, *drawn, "--output", tmp_path)
    found = json.loads((tmp_path / "samples.json").read_text())
    assert list(found["rows"]) == ["samples", "N(0, I)", "held-out", "language model"]
    assert (found["samples"], found["reference_texts"]) == (30, 70)
    names = {metric.name for metric in METRICS}
    for row in found["rows"].values():
        shown = set(row) - {"se", "examples", "unk"}
        assert {f"samples.{name}" for name in shown} <= names
        assert set(row["se"]) <= set(row)
        assert row["texts"] == 30
    vae = SentenceVAE.from_pretrained(str(files / "model"), device="cpu")
    expected = vae.sample(30, texts=TEXTS[:100], seed=0, max_new_tokens=9)
    assert found["rows"]["samples"]["examples"] == expected[:8]
    prior = vae.sample(30, seed=0, max_new_tokens=9)
    assert found["rows"]["N(0, I)"]["examples"] == prior[:8]
    real = found["rows"]["held-out"]
    chosen = samples.by_hash(TEXTS[100:])[:30]
    assert real["examples"] == chosen[:8]
    assert real["copies"] == np.mean([text in TEXTS[:100] for text in chosen])
    assert real["words"] == np.mean([len(text.split()) for text in chosen])
    said = capsys.readouterr().out
    report = (tmp_path / "samples.html").read_text()
    for word in ("generative_ppl", "held-out", "the last decoder state of", "warning"):
        assert word in said
        assert word in report
    assert {"valid", "factor_kl", "pair_kl"} <= real.keys()
    flow = ("--source", "flow", "--steps", 2, "--samples", 20, "--max_new_tokens", 5)
    run(files, files / "model", *flow, "--output", tmp_path / "flow")
    found = json.loads((tmp_path / "flow" / "samples.json").read_text())
    assert list(found["rows"]) == ["samples", "N(0, I)", "held-out", "language model"]
    assert found["flow"] == {"steps": 2, "solver": "euler", "guidance": 1.0, "label": None}
    expected = vae.sample(20, source="flow", steps=2, seed=0, max_new_tokens=5)
    assert found["rows"]["samples"]["examples"] == expected[:8]
    # The samples of the prior have no second row of the prior.
    prior = ("--samples", 20, "--max_new_tokens", 5, "--output", tmp_path / "prior")
    run(files, files / "model", *prior)
    found = json.loads((tmp_path / "prior" / "samples.json").read_text())
    assert list(found["rows"]) == ["samples", "held-out", "language model"]
    assert found["rows"]["samples"]["copies"] is None
    assert any("--train_file" in warning for warning in found["warnings"])


def test_a_file_of_texts_in_any_order(files, tmp_path, capsys):
    """Held-out texts as samples are as good as held-out texts."""
    rows = {}
    for name, step in (("plain", 1), ("reversed", -1)):
        file = tmp_path / f"{name}.txt"
        file.write_text("".join(f"{text}\n\n" for text in TEXTS[:100][::step]))
        run(files, file, "--samples", 40, "--output", tmp_path / name)
        rows[name] = json.loads((tmp_path / name / "samples.json").read_text())["rows"]
    assert rows["plain"]["samples"] == rows["reversed"]["samples"]
    both = [rows["plain"][name] for name in ("samples", "held-out")]
    for name in ("generative_ppl", "reverse_ppl", "distinct_4", "words"):
        spread = math.hypot(*(row["se"][name] for row in both))
        assert abs(both[0][name] - both[1][name]) < 5 * spread


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/nothing", "--reference", "{}/test.txt", "--lm", "{}/lm"], "nothing"),
        (["{}/test.txt", "--reference", "{}/nothing", "--lm", "{}/lm"], "no such file"),
        (["{}/test.txt", "--reference", "{}/test.txt", "--lm", "{}/model"], "not a language model"),
        (
            ["{}/test.txt", "--reference", "{}/test.txt", "--lm", "{}/lm", "--do_sample"],
            "is a file of texts",
        ),
        (
            ["{}/model", "--reference", "{}/test.txt", "--lm", "{}/lm", "--source", "aggregate"],
            "give --train_file",
        ),
        (
            ["{}/test.txt", "--reference", "{}/test.txt", "--lm", "{}/lm", "--samples", "1"],
            "at least 2 texts",
        ),
    ],
)
def test_what_cannot_be_measured(words, message, files, tmp_path, capsys):
    given = [word.replace("{}", str(files)) for word in words]
    assert main(["evaluate_samples", *given, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not Path(tmp_path / "out" / "samples.json").exists()
