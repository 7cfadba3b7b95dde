"""The whole evaluation of a small model: invariances, files, baseline, bad input."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from xml.etree import ElementTree

import numpy as np
import pytest
import sacrebleu
import torch
from launch import start
from small_models import SMALL, make_t5, make_vae, small_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dsvae import T5VAE
from dsvae.data import grammar
from dsvae.data.grammar import generate
from dsvae.data.noise import LATENT, PRIOR, normal
from dsvae.data.record_tokens import tokenize
from dsvae.data.records import Columns, Record
from dsvae.errors import UserError
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import (
    Measured,
    against_entropy,
    another_sentence,
    evaluate,
    measure,
    warnings_of,
)
from dsvae.metrics.reconstruction import compare
from dsvae.metrics.reconstruction import generate as greedy
from dsvae.modeling.families import GaussianFamily
from dsvae.parallel.world import World
from dsvae.reports import html
from dsvae.reports.evaluation import evaluate_directory, evaluate_model, evaluate_sentences
from dsvae.reports.figures import svg
from dsvae.reports.plots import plots
from dsvae.reports.sentences import read

SENTENCES = [drawn.text for drawn in generate(60, seed=3)]
LABELS = [f"type {drawn.factors[0]}" for drawn in generate(60, seed=3)]
SENTENCES[7] = SENTENCES[20]  # a repeated one


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(SENTENCES, SMALL["vocab_size"])


@pytest.fixture(scope="module")
def split(tokenizer):
    return tokenize(SENTENCES, tokenizer, 64, "test")[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    """A model directory, and test.txt with test.labels beside it."""
    return save(tmp_path_factory.mktemp("evaluation"), make_vae(), tokenizer)


def save(path, model, tokenizer):
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    (path / "test.txt").write_text("\n".join(SENTENCES) + "\n")
    (path / "test.labels").write_text("\n".join(LABELS) + "\n")
    return path


@pytest.fixture(autouse=True)
def _same_environment():
    """A run of one process leaves RANK and similar variables in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """The report without its figures, which are half of what an evaluation costs here. That
    of `metrics` has them."""
    monkeypatch.setattr(html, "plots", lambda *args: {})


def run(directory, output, **options):
    options = {
        "labels_file": str(directory / "test.labels"),
        "iw_samples": 3,
        "max_tokens": 24,
        "noise_sentences": 20,
        **options,
    }
    return evaluate_directory(
        str(directory / "model"), str(directory / "test.txt"), output=str(output), **options
    )


@pytest.fixture(scope="module")
def metrics(directory):
    before = dict(os.environ)
    found = run(directory, directory / "out", batch_tokens=4096)
    os.environ.clear()
    os.environ.update(before)
    return found


def numbers(value, prefix=""):
    """Every number in nested metrics, by its path."""
    if isinstance(value, dict):
        return {
            k: v
            for name, part in value.items()
            for k, v in numbers(part, f"{prefix}{name}.").items()
        }
    if isinstance(value, list):
        return {
            k: v for i, part in enumerate(value) for k, v in numbers(part, f"{prefix}{i}.").items()
        }
    return {prefix: value} if isinstance(value, (int, float)) else {}


def assert_same(one, two):
    one, two = numbers(one), numbers(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_batch_size_changes_nothing(directory, metrics, tmp_path):
    assert_same(metrics, run(directory, tmp_path / "out", batch_tokens=160))


def test_order_of_the_file_changes_nothing(directory, metrics, tmp_path):
    order = np.random.default_rng(0).permutation(len(SENTENCES))
    (tmp_path / "test.txt").write_text("".join(SENTENCES[i] + "\n" for i in order))
    (tmp_path / "test.labels").write_text("".join(LABELS[i] + "\n" for i in order))
    found = evaluate_directory(
        str(directory / "model"),
        str(tmp_path / "test.txt"),
        str(tmp_path / "test.labels"),
        str(tmp_path / "out"),
        iw_samples=3,
        max_tokens=24,
        noise_sentences=20,
    )
    assert_same(metrics, found)


def test_two_ranks_change_nothing(directory, metrics, tmp_path):
    (tmp_path / "command.py").write_text(
        "import sys\nfrom dsvae.cli import main\nsys.exit(main())\n"
    )
    run = start(
        "evaluate",
        directory / "model",
        "--output",
        tmp_path / "out",
        "--test_file",
        directory / "test.txt",
        "--labels_file",
        directory / "test.labels",
        "--iw_samples",
        "3",
        "--max_tokens",
        "24",
        "--noise_sentences",
        "20",
        ranks=2,
        script=tmp_path / "command.py",
    )
    try:
        output = [process.communicate(timeout=120) for process in run.processes]
    finally:
        run.kill()
    assert [process.returncode for process in run.processes] == [0, 0], output
    lines = output[0][0].splitlines()  # nothing but results
    assert lines[0] == "test.txt: 60 sentences"
    assert lines[2] == "Likelihood"
    assert [line.split()[0] for line in lines[-3:]] == ["report", "metrics", "projector"]
    assert output[1][0] == ""
    assert_same(metrics, json.loads((tmp_path / "out" / "metrics.json").read_text())["test"])


def test_what_is_in_the_metrics(metrics, split):
    assert metrics["sentences"] == 60
    assert metrics["tokens"] == np.minimum(split.lengths, 24).sum()
    assert metrics["truncated"] == (split.lengths > 24).sum()
    assert metrics["elbo"] == pytest.approx(-metrics["rec"] - metrics["kl"])
    assert metrics["kl"] == pytest.approx(metrics["mi"] + metrics["marginal_kl"])
    assert metrics["mi_cap"] == pytest.approx(np.log(60))
    assert metrics["mi"] < metrics["mi_upper"] <= metrics["kl"]
    assert (metrics["mi_sentences"], metrics["mi_posteriors"]) == (60, 60)
    assert metrics["kl"] == pytest.approx(sum(metrics["kl_per_dim"]))
    assert metrics["ppl_token"] == pytest.approx(np.exp(-metrics["elbo"] * 60 / metrics["tokens"]))
    assert 1 <= metrics["iw_ess_min"] <= metrics["iw_ess"] <= 3
    assert (
        metrics["au_curve"]["units"][metrics["au_curve"]["threshold"].index(0.01)] == metrics["au"]
    )
    means = (
        "rec",
        "kl",
        "elbo",
        "nll_iw",
        "mi",
        "rec_shuffled",
        "rec_prior",
        "token_accuracy_forced",
        "exact_match",
        "token_accuracy_free",
        "bleu",
        "bleu_area",
        "tokens_per_vector",
        "numbers_per_token",
        "nats_per_token",
        "participation_ratio",
    )
    assert all(metrics["se"][name] >= 0 for name in means)
    assert metrics["probes"]["label"]["classes"] == 3
    assert metrics["tokens_per_vector"] == pytest.approx(metrics["tokens"] / 60)
    assert metrics["numbers_per_token"] == pytest.approx(6 * 60 / metrics["tokens"])
    assert metrics["nats_per_token"] == pytest.approx(metrics["kl"] * 60 / metrics["tokens"])
    assert 1 <= metrics["participation_ratio"] <= 6


def pairs_of(texts, order):
    """(text, its number among equal texts) -> the same of the sentence that it is paired
    with, in that order of the file."""
    seen = Counter()
    names = []
    for i in order:
        seen[texts[i]] += 1
        names.append((texts[i], seen[texts[i]]))
    text_keys, content_keys = (
        np.array(
            [int.from_bytes(hashlib.md5(repr(key).encode()).digest()[:8], "big") for key in keys],
            dtype=np.uint64,
        )
        for keys in ([text for text, _ in names], names)
    )
    other = another_sentence(text_keys, content_keys)
    return (
        None
        if other is None
        else {name: names[j] for name, j in zip(names, other.tolist(), strict=True)}
    )


def test_another_sentence_has_another_text_wherever_there_is_one():
    """All files of up to six sentences with up to six texts, and random larger ones, each
    in two orders."""
    small = [
        texts for n in range(1, 7) for texts in itertools.combinations_with_replacement("abcdef", n)
    ]
    rng = np.random.default_rng(0)
    large = [[f"t{t}" for t in rng.integers(most, size=200)] for most in (2, 3, 20, 300)] + [
        ["t"] * 150 + ["u"] * 49 + ["v"]
    ]
    for texts in [*small, *large]:
        found = pairs_of(texts, range(len(texts)))
        if len(set(texts)) < 2:
            assert found is None
            continue
        assert all(text != other for (text, _), (other, _) in found.items())
        if 2 * max(Counter(texts).values()) <= len(texts):
            assert sorted(found) == sorted(found.values())  # every z once
        else:
            rare = {name for name in found if Counter(texts)[name[0]] * 2 <= len(texts)}
            assert rare <= set(found.values())  # and here every z of the others
        assert pairs_of(texts, rng.permutation(len(texts))) == found


def test_among_different_texts_another_sentence_is_the_next_by_content_key(split):
    different = split.select([i for i in range(60) if i != 20])
    order = sorted(range(59), key=lambda i: int(different.content_keys[i]))
    expected = {i: order[(place + 1) % 59] for place, i in enumerate(order)}
    found = another_sentence(different.text_keys, different.content_keys).tolist()
    assert len(set(different.hashes.tolist())) == 59
    assert dict(enumerate(found)) == expected


def noise_of(split, sample, model):
    """The noise of a sample of every sentence, (N, Z)."""
    keys = [(sample, key) for key in split.content_keys.tolist()]
    return torch.from_numpy(normal(0, LATENT, keys, model.config.latent_dim))


@torch.no_grad()
def test_the_likeliest_tokens_are_counted_as_a_plain_loop_counts_them(split):
    model = make_vae()
    found = evaluate(Passes(model, token_budget=512), split, samples=1)[0]
    noise, right = noise_of(split, 0, model), 0
    for i in range(60):
        ids = torch.from_numpy(split.ids(i))[None]
        logits = model(labels=ids, latent=model.encode(ids).sample(noise[i : i + 1])).logits
        right += int((logits.argmax(-1) == ids).sum())
    assert right > 0
    assert found["token_accuracy_forced"] == pytest.approx(right / found["tokens"])


@torch.no_grad()
def test_rec_shuffled_is_that_of_another_text(tokenizer):
    """Computed sentence by sentence, for two texts with three sentences each."""
    model = make_vae()
    split = tokenize([SENTENCES[0], SENTENCES[1]] * 3, tokenizer, 64, "test")[0]
    found = measure(Passes(model, token_budget=512), split, samples=1, seed=0)
    noise = noise_of(split, 0, model)
    ids = [torch.from_numpy(split.ids(i))[None] for i in range(6)]
    for i in range(6):
        possible = []
        for j in range((i + 1) % 2, 6, 2):
            logits = model(
                labels=ids[i], latent=model.encode(ids[j]).sample(noise[j : j + 1])
            ).logits
            possible.append(
                -float(
                    torch.log_softmax(logits, -1)[0, torch.arange(ids[i].shape[1]), ids[i][0]].sum()
                )
            )
        assert min(abs(float(found.rec_shuffled[i]) - each) for each in possible) < 1e-3


@pytest.mark.parametrize("count", [1, 4])
def test_without_another_text_there_is_no_rec_shuffled(directory, tmp_path, count):
    (tmp_path / "test.txt").write_text(f"{SENTENCES[0]}\n" * count)
    found = evaluate_directory(
        str(directory / "model"),
        str(tmp_path / "test.txt"),
        output=str(tmp_path / "out"),
        max_tokens=24,
    )
    assert np.isnan(found["rec_shuffled"])
    assert (
        json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]["rec_shuffled"] is None
    )
    assert not [
        warning for warning in found["warnings"] if "rec_shuffled" in warning or "nan" in warning
    ]


@pytest.mark.parametrize(
    ("gain", "deviation", "said"),
    [
        (
            0.0,
            0.0,
            "rec_shuffled - rec = 0.000 ± 0.000 nats: another text's z does as well; the decoder "
            "does not use z",
        ),
        (
            0.01,
            0.1,
            "rec_shuffled - rec = 0.010 ± 0.010 nats: another text's z does as well; the decoder "
            "does not use z",
        ),
        (
            2.0,
            10.0,
            "rec_shuffled - rec = 2.000 ± 1.000 nats: not distinguishable from 0 on 100 "
            "sentences; evaluate on more",
        ),
        (3.5, 10.0, None),
        (float("nan"), 0.0, None),
    ],
)
def test_a_collapse_differs_from_too_few_sentences(gain, deviation, said):
    unit = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = (unit - unit.mean()) / unit.std()
    rec = torch.full((100,), 40.0, dtype=torch.float64)
    nothing = torch.zeros(100)
    measured = Measured(
        encoded=None,
        draws=nothing,
        log_px_z=-rec[None],
        log_weights=nothing,
        kl=nothing,
        mi_rows=nothing,
        mi_terms=None,
        mi_posteriors=0,
        right=nothing,
        rec_shuffled=rec + gain + deviation * unit,
        rec_prior=nothing,
        codes={},
    )
    metrics = {
        "kl_per_dim": [1.0],
        "mi": 1.0,
        "mi_cap": 4.6,
        "sentences": 100,
        "rec": 40.0,
        "tokens": 9,
        "truncated": 0,
    }
    assert warnings_of(metrics, measured) == ([] if said is None else [said])
    assert len(warnings_of(metrics | {"iw_ess": 2.0, "iw_samples": 10}, measured)) == 1 + bool(said)
    assert warnings_of(metrics | {"iw_ess": 3.0, "iw_samples": 10}, measured) == (
        [] if said is None else [said]
    )
    assert warnings_of(metrics | {"mi": float("nan")}, measured) == ([] if said is None else [said])


def test_other_posteriors_of_the_same_text_raise_the_cap(tokenizer, monkeypatch):
    """Ten sentences with training ones beside them, but no more of those than fit."""
    split = tokenize(SENTENCES[:10], tokenizer, 64, "test")[0]
    more = tokenize(SENTENCES[10:], tokenizer, 64, "train")[0]
    model, options = make_vae(), {"samples": 1}
    passes = Passes(model, token_budget=512)
    with torch.no_grad():
        model.posterior.head.bias[model.config.latent_dim :] = -30.0  # posteriors far apart
    alone, both = (evaluate(passes, split, more=m, **options)[0] for m in (None, more))
    assert alone["mi"] == pytest.approx(np.log(10), abs=1e-3)
    assert both["mi_cap"] == pytest.approx(np.log(60))
    assert both["mi"] == pytest.approx(np.log(60), abs=0.2)  # one sentence stands there twice
    assert both["mi"] < both["mi_upper"] <= both["kl"]
    for found in (alone, both):
        assert math.isnan(found["marginal_kl"])
        assert any("mi_upper" in warning for warning in found["warnings"])
    assert (both["mi_sentences"], both["mi_posteriors"]) == (10, 60)
    monkeypatch.setattr("dsvae.metrics.information.POSTERIORS", 30)
    monkeypatch.setattr("dsvae.metrics.information.SENTENCES", 4)
    few = evaluate(passes, split, more=more, **options)[0]
    assert (few["mi_sentences"], few["mi_posteriors"]) == (4, 30)
    assert few["rec"] == alone["rec"]


def test_the_python_entry_measures_what_the_command_does(directory, metrics, tokenizer):
    """Without a file, and without its labels."""
    sentences = ["", *SENTENCES]
    model = T5VAE.from_pretrained(directory / "model")
    found = evaluate_model(model, tokenizer, sentences, iw_samples=3, max_tokens=24)
    assert found.pop("skipped_blank") == 1
    numbers_of = numbers(found)
    expected = numbers({name: metrics[name] for name in found if name in metrics})
    assert len(numbers_of) > 100
    for name, value in numbers_of.items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-4, nan_ok=True), name


def test_the_python_entry_takes_records(tokenizer):
    model = make_vae(conditional=True)
    records = [Record(text, condition="a condition") for text in SENTENCES[:8]]
    found = evaluate_model(model, tokenizer, records)
    assert found["conditions"] == 1
    with pytest.raises(UserError, match="condition"):
        evaluate_model(model, tokenizer, SENTENCES[:8])
    with pytest.raises(UserError, match="condition"):
        evaluate_model(model, tokenizer, [*records, Record("another")])


def test_what_is_left_behind(directory, metrics):
    out = directory / "out"
    assert json.loads((out / "metrics.json").read_text())["test"]["nll_iw"] == metrics["nll_iw"]
    report = (out / "report.html").read_text()
    first, rest = report.split("<h2>Measured</h2>")
    assert re.findall("<figcaption>(.*?)</figcaption>", first) == list(html.FIRST)
    assert all(about in first for about in html.FIRST.values())
    titles = re.findall("<figcaption>(.*?)</figcaption>", rest)
    assert titles
    assert not set(titles) & set(html.FIRST)
    files = {f"{title.lower().replace(' ', '_')}.png" for title in (*html.FIRST, *titles)}
    assert {path.name for path in (out / "plots").iterdir()} == files
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "plots").iterdir())
    assert report.count("data:image/svg+xml;base64,") == 5
    for title in ("Reconstruction by length", "Reconstruction by noise on z"):
        assert title in report
    assert not re.search(r'(src|href)="(?!data:)|https?://', report)  # nothing to fetch
    rows = (
        (out / "projector" / "00000" / "posterior_mean" / "metadata.tsv").read_text().splitlines()
    )
    assert rows[0] == "sentence\ttokens\tlabel"
    assert [row.split("\t")[2] for row in rows[1:]] == LABELS
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@torch.no_grad()
def test_weights_are_those_of_single_sentences(split):
    model = make_vae()
    passes = Passes(model, token_budget=512)
    found = measure(passes, split, samples=1, iw_samples=2, seed=0).log_weights
    noise = noise_of(split, 1, model)
    for i in (0, 7, 20, 59):
        ids = torch.from_numpy(split.ids(i))[None]
        q = model.encode(ids)
        z = q.sample(noise[i : i + 1])
        logits = model(labels=ids, latent=z).logits
        log_px_z = torch.log_softmax(logits, -1)[0, torch.arange(ids.shape[1]), ids[0]].sum()
        expected = log_px_z + GaussianFamily(z.shape[1]).prior().log_prob(z)[0] - q.log_prob(z)[0]
        assert float(found[1, i]) == pytest.approx(float(expected), abs=1e-3)


def test_reconstructions_are_those_of_single_sentences(split):
    model = make_vae()
    passes = Passes(model, token_budget=256)
    mean = passes.encode(split).posterior.mean
    decoded = greedy(passes, mean, 12, split)
    for i in range(0, 60, 7):
        alone = model.generate(latent=mean[i : i + 1], max_new_tokens=12, do_sample=False)[0, 1:]
        np.testing.assert_array_equal(decoded[i], alone.numpy()[: len(decoded[i])])
        assert decoded[i][-1] == model.config.eos_token_id or len(decoded[i]) == 12
        assert model.config.eos_token_id not in decoded[i][:-1]


def test_reconstruction_scores_by_hand(tokenizer):
    texts = ["the king sold the hat", "the lady"]
    split = tokenize(texts, tokenizer, 64, "test")[0]
    rows = split.rows([0, 1])
    right = torch.zeros(2)
    perfect = compare(split, ["the king  sold the\that", "the lady"], rows, tokenizer, right)
    assert [perfect[name] for name in ("exact_match", "token_accuracy_free")] == [1, 1]
    assert [perfect["bleu"], perfect["chrf"]] == pytest.approx([100, 100])
    # One token inserted in front moves all others; a reconstruction that stops early
    # lacks the rest.
    shifted = np.concatenate([[5], rows[0]])
    same = int((shifted[: len(rows[0])] == rows[0]).sum())
    found = compare(split, texts, [shifted, rows[1][:1]], tokenizer, right)
    assert found["exact_match"] == 0
    # The first pair has as many places as the longer, which is the reconstruction.
    assert found["token_accuracy_free"] == pytest.approx((same + 1) / (split.lengths.sum() + 1))


def word_tokenizer():
    """One piece per word, an unknown piece, and a configuration that cleans decoded text."""
    words = ["<pad>", "</s>", "<unk>", "the", "king", "did", "n't", "go", "home", "."]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )


def test_reconstructions_are_compared_with_the_users_text():
    """All tokens come back, but not the text of an unknown piece."""
    texts = ["the king did n't go home .", "the zebra did n't go home ."]
    tokenizer = word_tokenizer()
    split = tokenize(texts, tokenizer, 64, "test")[0]
    found = compare(split, texts, split.rows([0, 1]), tokenizer, torch.zeros(2))
    assert (found["token_accuracy_free"], found["exact_match"]) == (1, 0.5)
    back = [texts[0], "the <unk> did n't go home ."]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(back, [texts]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(back, [texts]).score)
    assert found["bleu"] < 90


def test_a_truncated_sentence_is_what_its_tokens_cover(tmp_path):
    (tmp_path / "t.txt").write_text("  the zebra did  n't go home .\n\nthe king .\n")
    found = read(str(tmp_path / "t.txt"), None, Columns(), make_vae().config, word_tokenizer(), 5)
    assert found.texts == ["the zebra did  n't", "the king ."]
    # This tokenizer does not say where its tokens end.
    (tmp_path / "t.txt").write_text("the zebra\n\nking\n")
    found = read(str(tmp_path / "t.txt"), None, Columns(), make_vae().config, ByT5Tokenizer(), 6)
    assert found.texts == ["the z", "king"]


def test_a_language_model_without_latent_goes_through(tmp_path, tokenizer, split):
    model = make_vae(injection="none")
    save(tmp_path, model, tokenizer)
    found = run(tmp_path, tmp_path / "out", noise_sentences=0)
    assert (found["latent_dim"], found["kl"], found["mi"], found["au"]) == (0, 0, 0, 0)
    assert (
        found["rec"] == found["rec_shuffled"] == found["rec_prior"] == pytest.approx(-found["elbo"])
    )
    assert found["nll_iw"] == pytest.approx(found["rec"], rel=1e-6)
    ids = torch.from_numpy(split.ids(0))[None]
    with torch.no_grad():
        logits = model(labels=ids, latent=torch.zeros(1, 0)).logits
    alone = -torch.log_softmax(logits, -1)[0, torch.arange(ids.shape[1]), ids[0]].sum()
    passes = Passes(model, token_budget=512)
    scored = passes.decode(
        split, lambda rows: (torch.zeros(len(rows), 0), torch.zeros(len(rows), 0)), "nothing"
    )
    one = -scored.log_px_z[0]
    assert float(one) == pytest.approx(float(alone), abs=1e-3)
    assert "probes" not in found
    assert not {"exact_match", "participation_ratio", "numbers_per_token"} & set(found)
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "projector").exists()


def test_a_language_model_is_decoded_once(split):
    model, count = make_vae(injection="none"), []
    model.register_forward_hook(lambda *_: count.append(1))
    evaluate(Passes(model, token_budget=10_000), split, samples=2, iw_samples=3)
    assert len(count) == 1  # all sentences are one batch


class Half(World):
    """One of two ranks, which never meets the other."""

    def _reduce(self, tensor, how):
        return tensor


def test_a_rank_draws_the_noise_of_its_own_sentences(split, monkeypatch):
    drawn = {0: [], 1: []}
    for rank, found in drawn.items():

        def recorded(seed, purpose, keys, *shape, found=found):
            found += [(purpose, *key) for key in keys]
            return normal(seed, purpose, keys, *shape)

        monkeypatch.setattr("dsvae.inference.passes.normal", recorded)
        passes = Passes(make_vae(), Half(rank, rank, 2, torch.device("cpu")), token_budget=128)
        measure(passes, split, samples=2, iw_samples=3, seed=0)
    streams = ((LATENT, 0), (LATENT, 1), (LATENT, 2), (PRIOR, 0))
    expected = {(*stream, key) for stream in streams for key in split.content_keys.tolist()}
    assert set(drawn[0]) | set(drawn[1]) == expected
    # a rank without a sentence takes a filler, once per pass at most
    assert len(drawn[0]) + len(drawn[1]) <= len(expected) + len(streams)


class Watchdog:
    """Records heartbeats and how deep hang detection is suspended."""

    def __init__(self):
        self.beats, self.suspended = [], 0

    def heartbeat(self, where):
        self.beats.append(where)

    @contextmanager
    def suspend_hang_detection(self):
        self.suspended += 1
        yield
        self.suspended -= 1


def test_long_work_is_not_taken_for_a_hang(tokenizer, monkeypatch):
    """Rank 0 trains forests and probes for minutes, and every rank decodes for minutes."""
    watchdog, suspended = Watchdog(), []

    def train(*_):
        suspended.append(watchdog.suspended)
        return {}

    monkeypatch.setattr("dsvae.reports.sentences.BUILTIN_SENTENCES", 60)
    monkeypatch.setattr("dsvae.reports.evaluation.disentanglement", train)
    monkeypatch.setattr("dsvae.reports.evaluation.probe", train)
    world = World(0, 0, 1, torch.device("cpu"), watchdog)
    text = read(None, None, Columns(), make_vae().config, tokenizer, 24)
    options = {"samples": 1, "iw_samples": None, "max_tokens": 24, "seed": 0}
    passes = Passes(make_vae(), world, token_budget=128)
    evaluate_sentences(passes, tokenizer, text, **options)
    assert len(suspended) == 10  # nine factors to probe, and their scores
    assert min(suspended) == 1
    assert watchdog.beats.count("generation") >= 10  # one per batch


def test_the_built_in_corpus_brings_its_factors(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("dsvae.reports.sentences.BUILTIN_SENTENCES", 400)
    # more than scikit-learn takes
    found = evaluate_directory(
        str(directory / "model"), output=str(tmp_path / "out"), seed=2**53 - 1
    )
    assert len(found["probes"]) == len(found["disentanglement"]["per_factor"]) == 9
    assert 0 <= found["disentanglement"]["mig"] <= 1
    assert "nll_iw" not in found
    assert not any("no unit" in warning for warning in found["warnings"])


def test_a_collapsed_latent_has_nothing_to_probe(tmp_path, tokenizer, monkeypatch, capsys):
    """The means differ between sentences, but their scale is close to 0."""
    monkeypatch.setattr("dsvae.reports.sentences.BUILTIN_SENTENCES", 100)
    model = make_vae()
    with torch.no_grad():
        head = model.posterior.head
        head.weight[: model.config.latent_dim] *= 1e-3
        head.bias[: model.config.latent_dim] *= 1e-3
    save(tmp_path, model, tokenizer)
    found = evaluate_directory(str(tmp_path / "model"), output=str(tmp_path / "out"))
    assert found["au"] == 0
    assert found["disentanglement"] is None
    assert len(found["probes"]) == 9
    assert set(found["probes"].values()) == {None}
    assert any("no unit of z is active" in warning for warning in found["warnings"])
    assert "no active unit; mutual information gap" in capsys.readouterr().out
    assert "no active unit" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("elbo", "truncated", "unk", "expected"),
    [
        # the best possible code gives each of the 3,538,944 sentences the same length
        (-math.log(3_538_944), 0, 0, 0.0),
        (-17.0, 0, 0, 17.0 - math.log(3_538_944)),
        (-17.0, 1, 0, None),
        (-17.0, 0, 1, None),
    ],
)
def test_what_is_paid_above_the_entropy(elbo, truncated, unk, expected):
    metrics = {"elbo": elbo, "truncated": truncated}
    found = against_entropy(metrics, grammar.ENTROPY, unk)
    assert against_entropy(metrics, None, unk) == {}
    if expected is None:  # the entropy of what is left of the sentences is not known
        assert found == {}
    else:
        assert found["entropy"] == pytest.approx(15.079, abs=5e-4)
        assert found["above_entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("hub", [False, True])
def test_without_output_nothing_is_written_where_a_hub_model_would_be_looked_for(
    directory, tmp_path, monkeypatch, hub
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "dsvae.pretrained.snapshot_download",
        lambda name, **_: {"someone/model": directory / "model"}[name],
    )
    local = shutil.copytree(directory / "model", tmp_path / "local" / "model")
    evaluate_directory(
        "someone/model" if hub else "local/model", str(directory / "test.txt"), max_tokens=24
    )
    output = tmp_path / "evaluation" if hub else local / "evaluation"
    assert (output / "metrics.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["evaluation", "local"] if hub else ["local"]
    )
    assert not (directory / "model" / "evaluation").exists()


def test_markup_in_sentences_stays_text(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "plots", plots)
    (tmp_path / "t.txt").write_text(
        "".join(f"the <b>king</b> sold ﬁne $ {SENTENCES[i]} $\n" for i in range(20))
    )
    (tmp_path / "t.labels").write_text("".join(f"<b>$x_{i % 2}$</b>\n" for i in range(20)))
    evaluate_directory(
        str(directory / "model"),
        str(tmp_path / "t.txt"),
        str(tmp_path / "t.labels"),
        str(tmp_path / "out"),
    )
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in report
    # as the user wrote it, where the tokenizer has two letters for the ligature
    assert report.count("king&lt;/b&gt; sold ﬁne $") == 20
    metadata = tmp_path / "out" / "projector" / "00000" / "posterior_mean" / "metadata.tsv"
    assert metadata.read_text().count("<b>king</b> sold ﬁne $") == 20


def test_every_label_stands_in_the_legend(directory, tmp_path, monkeypatch):
    """matplotlib leaves out labels that begin with an underscore."""
    labels = ["_", "__a", "b", "_$x_1$"]
    (tmp_path / "test.labels").write_text("".join(f"{labels[i % 4]}\n" for i in range(60)))
    seen = {}
    monkeypatch.setattr(html, "plots", lambda *args: seen.setdefault("plots", plots(*args)))
    run(directory, tmp_path / "out", labels_file=str(tmp_path / "test.labels"), iw_samples=None)
    texts = [
        element.text.strip()
        for element in ElementTree.fromstring(svg(seen["plots"]["Latents"])).iter()
        if element.text
    ]
    assert [text for text in texts if text in labels] == sorted(labels)


def test_labels_stay_with_their_sentences(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("".join(f"{s}\n\n" for s in SENTENCES))
    (tmp_path / "t.labels").write_text("".join(f"{label}\n\n" for label in LABELS))
    found = read(
        str(tmp_path / "t.txt"),
        str(tmp_path / "t.labels"),
        Columns(),
        make_vae().config,
        tokenizer,
        64,
    )
    assert found.labels["label"].tolist() == LABELS
    assert len(found.split) == 60
    assert found.counts["skipped_blank"] == 60


def test_some_sentences_are_the_same_in_every_order(tmp_path, tokenizer):
    model, orders = make_vae(), [np.arange(60), np.random.default_rng(0).permutation(60)]
    found = []
    for order in orders:
        (tmp_path / "t.txt").write_text("".join(f"{SENTENCES[i]}\n\n" for i in order))
        (tmp_path / "t.labels").write_text("".join(f"{LABELS[i]}\n\n" for i in order))
        files = (str(tmp_path / "t.txt"), str(tmp_path / "t.labels"))
        found.append(read(*files, Columns(), model.config, tokenizer, 64, 40))
    pairs = [list(zip(each.texts, each.labels["label"], strict=True)) for each in found]
    assert len(pairs[0]) == len(found[0].split) == 40
    assert sorted(text for text, _ in pairs[0]) == sorted(text for text, _ in pairs[1])
    assert set(pairs[0]) <= set(zip(SENTENCES, LABELS, strict=True))
    assert found[0].counts["skipped_blank"] == 60
    everything = read(*files, Columns(), model.config, tokenizer, 64, 60)
    assert len(everything.split) == 60
    assert everything.source == "t.txt"


def test_truncation_is_counted(directory, tmp_path):
    found = run(directory, tmp_path / "out", max_tokens=6, iw_samples=None)
    assert found["truncated"] == 60
    assert found["tokens"] == 360
    assert any("truncated" in warning for warning in found["warnings"])


@pytest.mark.parametrize("trained", [9, None])
def test_sentences_are_cut_where_training_cut_them(directory, tmp_path, tokenizer, trained):
    model = make_vae()
    model.config.max_tokens = trained
    lengths = [len(tokenizer(text).input_ids) for text in SENTENCES]
    save(tmp_path, model, tokenizer)
    found = evaluate_directory(str(tmp_path / "model"), str(tmp_path / "test.txt"))
    limit = trained or 64
    assert (found["max_tokens"], found["tokens"]) == (
        limit,
        sum(min(length, limit) for length in lengths),
    )
    assert found["truncated"] == sum(length > limit for length in lengths)
    found = evaluate_directory(str(tmp_path / "model"), str(tmp_path / "test.txt"), max_tokens=12)
    assert (found["max_tokens"], found["tokens"]) == (
        12,
        sum(min(length, 12) for length in lengths),
    )


def write(path, text):
    path.write_text(text)
    return str(path)


BAD = {
    "no such directory": (lambda d, t: {"model_dir": str(t / "nothing")}, "no such directory"),
    "no model": (lambda d, t: {"model_dir": str(d)}, "no config.json.*is it .*model"),
    "another model": (
        lambda d, t: {"model_dir": str(make_t5("t5 v1.0", t))},
        "contains a t5 model",
    ),
    "missing file": (lambda d, t: {"test_file": str(t / "nothing.txt")}, "no such file"),
    "empty file": (lambda d, t: {"test_file": write(t / "empty.txt", "")}, "is empty"),
    "blank file": (
        lambda d, t: {"test_file": write(t / "blank.txt", "\n\n"), "labels_file": None},
        "no sentences",
    ),
    "labels of another length": (
        lambda d, t: {"labels_file": write(t / "l", "a\nb\n")},
        "has 2 lines, but .* has 60",
    ),
    "missing labels": (lambda d, t: {"labels_file": str(t / "nothing")}, "no such file"),
    "a sentence without label": (
        lambda d, t: {"labels_file": write(t / "l", "a\n\n" + "a\n" * 58)},
        ":2: no label",
    ),
    "a single label": (lambda d, t: {"labels_file": write(t / "l", "a\n" * 60)}, "two"),
    "labels alone": (lambda d, t: {"test_file": None}, "without --test_file"),
    "k below 1": (lambda d, t: {"iw_samples": 0}, "iw_samples must be at least 1"),
    "no samples": (lambda d, t: {"samples": 0}, "samples must be at least 1"),
    "half a sample": (lambda d, t: {"samples": 1.5}, "samples must be a whole number"),
    "a negative seed": (lambda d, t: {"seed": -1}, "seed must be"),
    "a seed of too many bits": (
        lambda d, t: {"seed": 2**53},
        r"seed must be from 0 to 2\^53 - 1",
    ),
    "factors cut off": (
        lambda d, t: {"test_file": None, "labels_file": None, "max_tokens": 2},
        "built-in corpus .* truncated to 2 tokens: .* a probe needs two such labels; give a larger "
        "--max_tokens",
    ),
    "less than no noise": (lambda d, t: {"noise_sentences": -1}, "noise_sentences must be"),
    "one token": (lambda d, t: {"max_tokens": 1}, "max_tokens must be at least 2"),
    "no directory to write to": (
        lambda d, t: {"output": write(t / "file", "")},
        "give another --output",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, directory, tmp_path):
    arguments = {
        "model_dir": str(directory / "model"),
        "test_file": str(directory / "test.txt"),
        "labels_file": str(directory / "test.labels"),
        "output": str(tmp_path / "out"),
    }
    change, message = BAD[name]
    with pytest.raises(UserError, match=message) as raised:
        evaluate_directory(**arguments | change(directory, tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ({"injection": "none"}, "has no latent"),
        ({"family": "categorical", "categories": 3}, "has a latent of categories"),
    ],
)
def test_noise_needs_a_continuous_latent(latent, message, directory, tmp_path, tokenizer):
    save(tmp_path, make_vae(**latent), tokenizer)
    with pytest.raises(UserError, match=f"noise_sentences 5: this model {message}"):
        run(tmp_path, tmp_path / "out", noise_sentences=5, labels_file=None)
    assert not (tmp_path / "out").exists()
    found = run(tmp_path, tmp_path / "out", noise_sentences=0, labels_file=None)
    assert "participation_ratio" not in found
    assert 0 < found["token_accuracy_forced"] < 1


def test_damaged_models(directory, tmp_path, tokenizer):
    model = make_vae()
    model.save_pretrained(tmp_path / "no_tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        evaluate_directory(str(tmp_path / "no_tokenizer"), str(directory / "test.txt"))
    model.save_pretrained(tmp_path / "no_weights")
    tokenizer.save_pretrained(tmp_path / "no_weights")
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        evaluate_directory(str(tmp_path / "no_weights"), str(directory / "test.txt"))
    state = {
        name: weight
        for name, weight in model.state_dict().items()
        if "posterior" not in name and name != "lm_head.weight"
    }
    model.save_pretrained(tmp_path / "no_head", state_dict=state)
    tokenizer.save_pretrained(tmp_path / "no_head")
    with pytest.raises(UserError, match=r"lacks weights: posterior"):
        evaluate_directory(str(tmp_path / "no_head"), str(directory / "test.txt"))
    model.save_pretrained(tmp_path / "edited")
    tokenizer.save_pretrained(tmp_path / "edited")
    config = tmp_path / "edited" / "config.json"
    config.write_text(config.read_text().replace('"injection": "memory"', '"injection": "none"'))
    with pytest.raises(
        UserError, match=r"its config.json does not describe: encoder\..*original config.json$"
    ):
        evaluate_directory(str(tmp_path / "edited"), str(directory / "test.txt"))
