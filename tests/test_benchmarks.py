"""The scripts that measure models: trivial rows have trivial numbers, and the rest is
what a few lines of NumPy give."""

import argparse
import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import (
    analogies,
    conditional,
    levers,
    lstm_vae,
    relations,
    sparse,
    style_transfer,
    unseen_words,
)
from benchmarks.labelled import read
from benchmarks.lines import logic
from small_models import make_vae, small_tokenizer
from torch.nn.functional import cross_entropy

from dsvae.data import grammar, grammar_variants
from dsvae.data.grammar_variants import DEPENDENT, PAIRED_ENTROPY
from dsvae.data.noise import PRIOR, generator
from dsvae.data.record_tokens import tokenize
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE

WORDS = {"good": ("fine", "nice", "great"), "bad": ("poor", "sad", "vile")}
THINGS = ("tea", "bed", "cab", "beach", "ball", "bee", "dad", "cat")


def corpus(count, seed, noise):
    """Sentences whose adjective tells the label, and a share of labels that are wrong."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        label = str(rng.choice(list(WORDS)))
        texts.append(
            f"the {rng.choice(THINGS)} is a {rng.choice(WORDS[label])} {rng.choice(THINGS)}"
        )
        labels.append(label if rng.random() > noise else {"good": "bad", "bad": "good"}[label])
    return texts, labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments for training and test files."""
    directory = tmp_path_factory.mktemp("files")
    arguments = []
    for name, count, seed in (("train", 300, 0), ("test", 60, 1)):
        for kind, lines in zip(("file", "labels"), corpus(count, seed, 0.1), strict=True):
            path = directory / f"{name}.{kind}.txt"
            path.write_text("".join(f"{line}\n" for line in lines))
            arguments += [f"--{name}_{kind}", str(path)]
    return arguments


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(corpus(300, 0, 0)[0], 60)


@pytest.fixture(scope="module")
def save(tmp_path_factory, tokenizer):
    def call(name, **latent):
        directory = tmp_path_factory.mktemp(name)
        make_vae(max_tokens=24, **latent).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return call


@pytest.fixture(scope="module")
def language_model(save):
    return save("lm", injection="none")


@pytest.fixture(scope="module", params=["categorical", "gaussian", "spike_slab"])
def results(request, save, language_model, files, tmp_path_factory):
    """Family and results of the script with every test sentence, as it writes them."""
    path = tmp_path_factory.mktemp("out") / "results.json"
    model = save(request.param, family=request.param, categories=4, latent_dim=3)
    style_transfer.main(
        [model, language_model, *files, "--strengths", "0", "1", "--output", str(path)]
    )
    return request.param, json.loads(path.read_text())


def test_trivial_rows_of_style_transfer_have_trivial_numbers(results, files):
    family, found = results
    rows = found["rows"]
    own = found["classifier"]
    assert found["sentences"] == own["sentences"] == 60
    assert 0.7 < own["accuracy"] < 1  # a tenth of the labels is wrong
    assert rows["copy"]["accuracy"] == pytest.approx(1 - own["accuracy"])
    assert rows["copy"]["accuracy_se"] == pytest.approx(own["accuracy_se"])
    assert rows["copy"]["bleu"] == pytest.approx(100)
    assert rows["reconstruction"]["unchanged"] == 1
    test = read(files[5], files[7])
    labels = {text: set(test.labels[np.array(test.texts) == text]) for text in test.texts}
    for example in found["examples"]:
        assert example["target"] in labels[example["random, target label"]]
        assert example["random, any label"] != example["copy"]
        assert {example["label"], example["target"]} == {"bad", "good"}
    if family == "categorical":
        assert set(rows) >= {"transfer", "reconstruction", "copy"}
    else:
        still = dict(rows["direction, strength 0"])
        assert still == rows["reconstruction"]
        assert rows["direction, strength 1"]["unchanged"] < 1
    for row in rows.values():
        expected = 100 * row["accuracy"] * row["bleu"] * 100 / row["ppl"]
        assert row["gm"] ** 3 == pytest.approx(expected, rel=1e-6, abs=1e-9)
        sides = row["accuracy_toward"]
        shares = {label: np.mean(test.labels != label) for label in sides}
        assert row["accuracy"] == pytest.approx(sum(sides[s] * shares[s] for s in sides))


def test_perplexity_is_that_of_single_sentences(tokenizer):
    model = make_vae(injection="none")
    texts = ["the tea is a fine bed", "the bee", "a cat is poor"]
    nats = tokens = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(labels=ids, latent=torch.zeros(1, 0)).logits
        nats += float(cross_entropy(logits[0].double(), ids[0], reduction="sum"))
        tokens += ids.shape[1]
    found = style_transfer.perplexity(model, tokenizer, [*texts, " "])
    assert found["ppl"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["blank"] == 1
    assert math.isnan(style_transfer.perplexity(model, tokenizer, ["", " "])["ppl"])


def test_the_variable_that_tells_the_label_is_chosen_and_no_rare_value():
    rng = np.random.default_rng(0)
    labels = rng.choice(["no", "yes"], size=1000)
    codes = rng.integers(4, size=(1000, 3))
    # Values 0 and 1 for no, 2 for yes nine times of ten; 3 only for yes, but rarely.
    codes[:, 1] = np.where(labels == "no", rng.integers(2, size=1000), 2)
    codes[rng.random(1000) < 0.1, 1] = 2
    codes[np.flatnonzero(labels == "yes")[:9], 1] = 3
    codes[np.flatnonzero(labels == "no")[:700], 1] = 1  # so that 1 is the more frequent one
    found = style_transfer.choose(codes, labels)
    assert found["variable"] == 1
    assert found["labels"]["yes"]["value"] == 2
    has = codes[:, 1] == 2
    assert found["labels"]["yes"]["share"] == pytest.approx((labels[has] == "yes").mean())
    assert found["labels"]["yes"]["count"] == has.sum()
    assert found["labels"]["no"] == {"value": 1, "share": 1.0, "count": (codes[:, 1] == 1).sum()}
    joint = np.array(
        [[np.mean((codes[:, 0] == k) & (labels == v)) for v in ("no", "yes")] for k in range(4)]
    )
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    assert found["information"][0] == pytest.approx((joint * np.log(joint / apart)).sum())


@pytest.mark.parametrize("family", ["categorical", "gaussian"])
def test_z_is_moved_as_the_script_says(family, tokenizer, files):
    vae = SentenceVAE(make_vae(family=family, categories=4, latent_dim=3), tokenizer)
    train = read(files[1], files[3])
    point = vae.encode(["the tea is a fine bed", "the bee is a sad cat"]).point
    targets = np.array(["bad", "good"])
    moved, how = style_transfer.transfers(vae, train, point, targets, [2.0])
    (z,) = moved.values()
    if family == "gaussian":
        means = vae.encode(train.texts).point
        good, bad = (means[torch.from_numpy(train.labels == each)].mean(0) for each in WORDS)
        toward = torch.stack([bad - good, good - bad])
        torch.testing.assert_close(z, point + 2 * toward, rtol=1e-4, atol=1e-5)
        return
    before, after = (each.view(2, 3, 4).argmax(-1) for each in (point, z))
    unit = how["variable"]
    assert z.view(2, 3, 4).sum(-1).tolist() == [[1] * 3] * 2
    assert after[:, unit].tolist() == [how["labels"][target]["value"] for target in targets]
    others = [i for i in range(3) if i != unit]
    assert torch.equal(before[:, others], after[:, others])


def test_sparsity_of_runs(save, files, tmp_path, capsys):
    runs = []
    for seed in range(2):
        directory = tmp_path / f"sparse_s{seed}"
        directory.mkdir()
        model = save("spike", family="spike_slab", latent_dim=5, seed=seed)
        (directory / "model").symlink_to(model)
        test = {"rec": 30.0 + seed, "kl": 4.0, "rec_shuffled": 40.0 + 3 * seed, "au": 5}
        (directory / "metrics.json").write_text(json.dumps({"test": test}))
        runs.append(str(directory))
    output = tmp_path / "out.json"
    sparse.main([*runs, *files, "--output", str(output)])
    found = json.loads(output.read_text())
    vae = SentenceVAE.from_pretrained(runs[1] + "/model", device="cpu")
    test = read(files[5], files[7])
    q = vae.encode(test.texts)
    point, spike = q.point.double().numpy(), q.tensors()["spike"].double().numpy()
    norms = np.abs(point).sum(1) / np.sqrt((point**2).sum(1))
    expected = (math.sqrt(5) - norms) / (math.sqrt(5) - 1)
    row = found["sparse_s1"]
    assert row["hoyer_raw"] == pytest.approx(expected[np.isfinite(expected)].mean(), abs=1e-5)
    assert row["units_used"] == pytest.approx((1 - spike).sum(1).mean(), abs=1e-5)
    assert row["var_spike"] == pytest.approx(spike.var(0, ddof=1).mean(), abs=1e-6)
    train = read(files[1], files[3])
    commonest = max(WORDS, key=lambda label: (train.labels == label).sum())
    assert row["majority"] == pytest.approx((test.labels == commonest).mean())
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    table = dict(zip([c.strip() for c in lines[0].split("|")[1:-1]], cells, strict=True))
    assert (table["runs"], table["number"]) == ("sparse", "2")
    assert table["rec"] == f"30.500 ± {0.5**0.5:.3f}"
    assert table["rec_shuffled-rec"] == f"11.000 ± {2**0.5:.3f}"


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(800, 4, generator=rng)
    labels = np.where(z[:, 2] > 0, "a", "b")
    assert sparse.accuracy((z[:400], labels[:400]), (z[400:], labels[400:])) > 0.95
    noise = torch.randn(800, 4, generator=rng)
    found = sparse.accuracy((noise[:400], labels[:400]), (noise[400:], labels[400:]))
    assert found == pytest.approx(0.5, abs=0.1)


def test_the_texts_of_a_condition_have_the_probabilities_of_the_paired_corpus():
    """They sum to 1, and their entropy is the known one."""
    named = {"subject": "artist", "verb": "admire", "object": "knife"}
    free = {name: grammar.FACTORS[name] for name in (*DEPENDENT, "adjective")}
    nats = [
        conditional.paired_nats(
            "artist admire knife",
            grammar.sentence(named | dict(zip(free, values, strict=True))),
        )
        for values in product(*free.values())
    ]
    assert len(nats) == 864
    assert sum(math.exp(-each) for each in nats) == pytest.approx(1)
    assert sum(each * math.exp(-each) for each in nats) == pytest.approx(PAIRED_ENTROPY)
    drawn = conditional.paired_texts("artist admire knife", 3000, 0)
    found = np.mean([conditional.paired_nats("artist admire knife", text) for text in drawn])
    assert found == pytest.approx(PAIRED_ENTROPY, abs=0.15)  # four standard errors are 0.12
    text = "The kings broke a red lamp."
    assert conditional.paired_nats("king break lamp", text) < math.inf
    assert conditional.paired_nats("king break knife", text) == math.inf
    assert conditional.paired_nats("king break lamp", "The kings the lamp.") == math.inf


def test_adherence_and_triples():
    found = conditional.of_grammar(
        ["king break lamp", "witch carry key"],
        [
            ["The kings broke a red lamp.", "The king broke old lamps.", "The kings broke."],
            ["Will the witch not carry old keys?", "The kings broke a red lamp.", "no"],
        ],
    )
    assert found == {"adherence": 0.5, "triples": 1.5}


@pytest.mark.parametrize("latent", [{"prior": "learned"}, {}, {"injection": "none"}])
def test_conditional_outputs_are_those_of_each_condition_alone(latent, tokenizer, tmp_path, capsys):
    model = make_vae(conditional=True, **latent)
    conditions = ["tea", "the bad cat", "a bee"]
    found = conditional.outputs(model, tokenizer, conditions, 2, max_tokens=8)
    width = model.family.noise_width
    for i, condition in enumerate(conditions):
        ids = tokenizer(condition, return_tensors="pt").input_ids
        for draw, text in enumerate(found[i]):
            noise = generator(0, PRIOR, draw, i).standard_normal(width)
            latent_of = model.prior(ids).sample(torch.from_numpy(noise[None]).float())
            alone = model.generate(latent=latent_of, condition_ids=ids, max_new_tokens=8)
            assert tokenizer.decode(alone[0], skip_special_tokens=True) == text
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    metrics = {"rec": 3.0, "kl": 2.0, "elbo": -5.0, "rec_shuffled": 4.0, "rec_prior": None}
    (run / "metrics.json").write_text(json.dumps({"test": metrics}))
    file = tmp_path / "test.jsonl"
    records = [{"condition": each, "text": "the tea"} for each in conditions]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    output = tmp_path / "out.json"
    conditional.main([str(run), "--test_file", str(file), "--draws", "2", "--output", str(output)])
    row = json.loads(output.read_text())["run"]
    assert (row["rec+kl"], row["rec_shuffled-rec"], row["adherence"]) == (5, 1, 0)
    assert "3 conditions, 2 draws" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(save, language_model, files, tmp_path, capsys):
    with pytest.raises(SystemExit):
        style_transfer.main([save("a"), save("b"), *files])
    assert "has a latent: give a model of injection none" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("good\n")
    with pytest.raises(UserError, match="give one label per line"):
        read(files[1], str(short))
    with pytest.raises(SystemExit):
        style_transfer.main([save("c"), language_model, *files[:6], "--test_labels", files[3]])


def test_the_best_guess_from_a_pair_is_right_as_often_as_any_can_be():
    """Over all pairs, max_r p(s|r) p(o|r) / 8 sums to .9125."""
    records = [each.record for each in grammar_variants.relations(4000, 3)]
    pairs = relations.pairs_of(records)
    numbers = dict(zip((record["text"] for record in records), map(tuple, pairs), strict=True))
    assert len(set(numbers.values())) == len(numbers) == len(np.unique(pairs, axis=0))
    labels = np.array([record["label"] for record in records])
    right = (relations.best_guess(pairs) == labels).mean()
    assert right == pytest.approx(0.9125, abs=4 * math.sqrt(0.9125 * 0.0875 / 4000))
    clear = pairs[:, 0] // 2 == pairs[:, 1] // 2
    assert (relations.best_guess(pairs) == pairs[:, 0] // 2)[clear].all()


def test_clusters_of_models(save, tokenizer, capsys):
    texts = [f"the {a} is a {b}" for a in THINGS for b in THINGS]
    models = [
        save("clusters", clusters=5),
        save("codes", family="categorical", latent_dim=2, categories=3),
    ]
    found = [relations.of_model(model, texts) for model in models]
    for model, clusters, most in zip(models, found, (5, 9), strict=True):
        vae = SentenceVAE.from_pretrained(model)
        for i in (0, 37):
            ids = tokenizer(texts[i], return_tensors="pt")
            with torch.no_grad():
                out = vae.model(ids.input_ids, encode_only=True)
            if out.clusters is not None:
                own = int(out.clusters.argmax())
            else:
                own = out.posterior.parameters.view(2, 3).argmax(-1) @ torch.tensor([1, 3])
            assert clusters[i] == own
        assert len(clusters) == len(texts)
        assert 0 <= clusters.min() <= clusters.max() < most
    assert relations.main([models[0], "--sentences", "50"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:3]] == ["| one cluster", "| random"]
    assert rows[1].split(" | ")[2] == "1.000"


def test_no_labelled_sentence_has_a_held_out_occupation(tmp_path):
    unseen_words.main([str(tmp_path), "-n", "300", "--labelled", "40"])
    held = set(unseen_words.HELD_OUT)
    records = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        for name in ("train", "valid", "test")
    }

    def occupations(record):
        text = record["text"].lower().replace(".", "").replace("?", "").replace("!", "")
        return {word.removesuffix("s") for word in text.split()} & held

    labelled = [record for record in records["train"] if record["label"] is not None]
    assert len(labelled) == 40
    assert not any(occupations(record) for record in labelled)
    assert any(occupations(record) for record in records["train"])
    for name in ("valid", "test"):
        assert all(
            occupations(record) and record["label"] == "occupation" for record in records[name]
        )


def by_hand(model, ids, z):
    """log p(x|z) of one sentence for z (J, 1), (J,): cell by cell."""
    weights = [p.detach().double() for p in model.decoder._flat_weights]
    z = z.double()
    cell = z @ model.start.weight.double().T + model.start.bias.double()
    state, previous = cell.tanh(), model.config.pad_token_id
    total = torch.zeros(len(z), dtype=torch.float64)
    for token in ids:
        own = model.embedding.weight[previous].double().expand(len(z), -1)
        gates = torch.cat([own, z], 1) @ weights[0].T + state @ weights[1].T
        gates = gates + weights[2] + weights[3]
        enter, forget, new, out = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        read = state @ model.output.weight.double().T + model.output.bias.double()
        scores = read @ model.embedding.weight.double().T + model.bias.double()
        total += scores.log_softmax(1)[:, token]
        previous = token
    return total


@torch.no_grad()
def test_the_bounds_of_an_lstm_approach_log_p_by_quadrature(tokenizer):
    torch.manual_seed(0)
    model = lstm_vae.LstmVae(60, 0, embedding=8, hidden=8, latent_dim=1)
    for each in model.parameters():
        each.mul_(3)  # so that z tells something
    split, _, _ = tokenize(corpus(12, 0, 0)[0], tokenizer, 24, "here")
    z = torch.linspace(-9, 9, 721)[:, None]
    log_prior = -0.5 * z[:, 0].double() ** 2 - 0.5 * math.log(2 * math.pi)
    exact, expected = [], {"rec": [], "kl": []}
    for ids in split.rows(range(len(split))):
        log_px_z = by_hand(model, ids, z)
        exact.append(float(torch.logsumexp(log_px_z + log_prior, 0)) + math.log(18 / 720))
        own = torch.from_numpy(ids)[None]
        mean, logvar = model.encode(own, torch.tensor([len(ids)]))[0].double()
        log_q = -0.5 * ((z[:, 0] - mean) ** 2 / logvar.exp() + logvar + math.log(2 * math.pi))
        share = log_q.exp() * 18 / 720
        expected["rec"].append(float(-(share * log_px_z).sum()))
        expected["kl"].append(float((share * (log_q - log_prior)).sum()))
    args = argparse.Namespace(iw_samples=20, draws=1000, draws_sentences=len(split))
    found = lstm_vae.measure(model, split, split, args)
    many, test = found["many_draws"], found["test"]
    assert many["kl"] == test["kl"] == pytest.approx(np.mean(expected["kl"]), rel=1e-4)
    assert many["nll_iw"] == pytest.approx(-np.mean(exact), abs=0.03)
    gap = np.mean(expected["rec"]) + test["kl"] + np.mean(exact)
    assert 0.03 < test["nll_iw"] + np.mean(exact) < 0.2 * gap
    assert test["rec"] == pytest.approx(np.mean(expected["rec"]), abs=4 * test["se"]["rec"])


@pytest.mark.parametrize("options", [["--latent_dim", "0"], ["--target", "2"]])
def test_an_lstm_comes_to_the_entropy_or_to_its_kl(options, save, tmp_path, capsys):
    files = []
    for name, count, seed in (("train", 2000, 0), ("test", 200, 1)):
        path = tmp_path / name
        path.write_text("".join(f"{text}\n" for text in corpus(count, seed, 0)[0]))
        files += [f"--{name}_file", str(path)]
    if "--target" in options:
        options += ["--latent_dim", "4", "--ae_steps", "100", "--draws", "20"]
    sizes = ["--hidden", "32", "--embedding", "16", "--batch_size", "32", "--lr", "0.01"]
    output = tmp_path / "out.json"
    lstm_vae.main([save("t5"), *files, *sizes, *options, "--steps", "300", "--output", str(output)])
    found = json.loads(output.read_text())
    test = found["test"]
    entropy = math.log(8 * 8 * 6)
    if "--target" not in options:
        assert entropy - 0.05 < test["rec"] < entropy + 0.4
        assert test["kl"] == 0
        return
    assert test["kl"] == pytest.approx(2, abs=0.6)
    assert test["rec"] < entropy - 0.3 < test["rec_shuffled"]
    assert entropy - 0.05 < test["nll_iw"] < test["rec"] + test["kl"]
    assert found["many_draws"]["iw_samples"] == 20
    assert f"{found['parameters']:,} parameters" in capsys.readouterr().out


def test_many_pairs_give_the_direction_of_the_label(tokenizer, files):
    vae = SentenceVAE(make_vae(latent_dim=3), tokenizer)
    train, test = read(files[1], files[3]), read(files[5], files[7])
    targets = np.where(test.labels == "good", "bad", "good")
    given = style_transfer.Given(vae, None, train, test, test, None, targets)
    point = vae.encode(test.texts).point
    found = analogies.analogies(given, point, [1, 4000], 300, 0)
    assert set(found) == {f"{n}{k}" for n in ("1 pair", "4000 pairs") for k in ("", ", any label")}
    toward = vae.attribute_vector(train.texts, train.labels.tolist(), "good")
    expected = point + torch.from_numpy(np.where(targets == "good", 1.0, -1.0))[:, None] * toward
    spread = float(vae.encode(train.texts).point.std(0).max())
    close = 6 * spread * math.sqrt(2 / 4000)
    torch.testing.assert_close(found["4000 pairs"].double(), expected, rtol=0, atol=close)
    torch.testing.assert_close(found["4000 pairs, any label"], point, rtol=0, atol=2 * close)
    assert (found["1 pair"] - expected).abs().max() > close


def test_paths_of_copies_and_of_a_model(save, language_model, files, tmp_path, capsys):
    model = save("paths", latent_dim=3)
    output = tmp_path / "out.json"
    arguments = [model, language_model, *files, "--sentences", "20"]
    analogies.main([*arguments, "--pairs", "2", "--steps", "5", "--output", str(output)])
    found = json.loads(output.read_text())
    rows = found["paths"]
    vae = SentenceVAE.from_pretrained(model, device="cpu")
    for example in found["examples"]:
        expected = vae.interpolate(example["sentence"], example["next"], steps=5)
        assert example["path"] == expected
    assert (rows["copy"]["distinct"], rows["copy"]["repeated"]) == (1 / 5, 1)
    assert rows["copy"]["step bleu"] is None
    assert rows["switch"]["distinct"] == pytest.approx(2 / 5, abs=0.05)  # two may be the same
    assert rows["switch"]["repeated"] == pytest.approx(3 / 4, abs=0.05)
    for name in ("copy", "switch"):
        places = rows[name]["places"]
        assert [place["t"] for place in places] == [0, 0.25, 0.5, 0.75, 1]
        assert places[0]["bleu_a"] == places[2]["bleu_first"] == pytest.approx(100)
    assert rows["switch"]["places"][-1]["bleu_b"] == pytest.approx(100)
    assert rows["copy"]["places"][-1]["bleu_b"] < 60
    for row in rows.values():
        assert row["places"][0]["bleu_first"] == row["places"][-1]["bleu_last"]
    assert found["analogies"]["copy"]["bleu"] == pytest.approx(100)
    assert "2 pairs, any label" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        analogies.main([save("codes", family="categorical", latent_dim=2), *arguments[1:]])
    assert "give another" in capsys.readouterr().err


def test_weights_become_their_moving_average_in_the_last_step(monkeypatch):
    monkeypatch.setattr(levers.deepspeed, "initialize", lambda **given: None)
    monkeypatch.setattr(levers.now, "phase", SimpleNamespace(number=2, steps=5))
    levers.ema(0.75)
    plain, averaged = (torch.nn.Parameter(torch.arange(3.0)) for _ in range(2))
    optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in (plain, averaged)]
    levers.deepspeed.initialize(optimizer=optimizers[1], lr_scheduler=None)
    seen = []
    for step in range(5):
        monkeypatch.setattr(levers.now, "step", step)
        if step:
            assert torch.equal(plain, averaged)
        for weight, optimizer in zip((plain, averaged), optimizers, strict=True):
            weight.grad = torch.tensor([1.0, -2.0, 0.5 * step])
            optimizer.step()
        seen.append(plain.detach().clone())
    shares = [0.75**4, *(0.25 * 0.75 ** (4 - i) for i in range(1, 5))]
    torch.testing.assert_close(
        averaged.detach(), sum(share * each for share, each in zip(shares, seen, strict=True))
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("emma=1", "did you mean ema"),
        ("ema", "ema takes decay"),
        ("ema=much", "ema takes decay"),
        ("refit", "refit takes share"),
    ],
)
def test_levers_that_are_none(word, message):
    with pytest.raises(UserError, match=message):
        levers.pull([word, "--seed", "1"])
    assert all(name in levers.usage() for name in levers.LEVERS)


def test_lines_of_logic_are_counted_without_what_is_not_logic():
    source = '''"""About."""

import os
from a import (
    b,
)

X = [  # three lines
    1,

]
TEXT = """two
lines"""
"""About TEXT."""


def f(x):
    """Returns x."""
    # why
    if x:
        raise ValueError(
            "no"
        )
    return x  # here
'''
    assert logic(source) == 3 + 2 + 3  # X, TEXT; def, if, return
