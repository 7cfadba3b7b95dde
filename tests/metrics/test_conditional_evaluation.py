"""`dsvae evaluate` of models with conditions, labels and tags: single-sentence references,
null fields, and what is refused."""

import json
import math
import os

import numpy as np
import pytest
import torch
from launch import start
from small_models import SMALL, make_vae, small_tokenizer

from dsvae.data.grammar_variants import paired, relations, tagged
from dsvae.data.noise import LATENT, PRIOR, normal
from dsvae.data.record_tokens import tokenize
from dsvae.data.records import Columns, Record
from dsvae.errors import UserError
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import evaluate, measure
from dsvae.parallel.world import World
from dsvae.reports.evaluation import evaluate_directory
from dsvae.reports.table import result_table, table

ALONE = World(0, 0, 1, torch.device("cpu"))
BEDS = {
    "paired": list(paired(40, 4)),
    "relations": list(relations(60, 4)),
    "tagged": list(tagged(60, 4)),
}
MODELS = {
    "paired": {"conditional": True, "prior": "learned"},
    "relations": {"posterior_reads": "condition", "clusters": 4},
    "tagged": {
        "classes": ["none", "occupation"],
        "tags": ["B-OBJ", "B-PROF", "I-OBJ", "O"],
    },
}
COLUMNS = {
    "paired": {"condition_column": "condition"},
    "relations": {"condition_column": "condition", "label_column": "label"},
    "tagged": {"label_column": "label", "tags_column": "tags"},
}


@pytest.fixture(autouse=True)
def _same_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [str(v) for bed in BEDS.values() for each in bed for v in each.record.values()]
    return small_tokenizer(texts, SMALL["vocab_size"])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """For each test bed KIND/model and KIND.jsonl."""
    path = tmp_path_factory.mktemp("conditional")
    for kind, bed in BEDS.items():
        make_vae(**MODELS[kind]).save_pretrained(path / kind)
        tokenizer.save_pretrained(path / kind)
        (path / f"{kind}.jsonl").write_text("".join(f"{json.dumps(e.record)}\n" for e in bed))
    return path


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """The paired records as a split."""
    records = [Record(each.record["text"], each.record["condition"]) for each in BEDS["paired"]]
    columns = Columns(condition="condition")
    return tokenize(records, tokenizer, 64, "test", columns)[0]


def single(model, split, row):
    """q(z|x,c), p(z|c), and -log p(x|z,c) of a z, of one record alone."""
    x = torch.from_numpy(split.ids(row))[None]
    c = torch.from_numpy(split.conditions([row])[0])[None]

    def rec(z):
        logits = model(labels=x, latent=z, condition_ids=c).logits
        return -torch.log_softmax(logits, -1)[0, torch.arange(x.shape[1]), x[0]].sum()

    return model.encode(torch.cat([c, x], 1)), model.prior(c), rec


@torch.no_grad()
@pytest.mark.parametrize("family", ["gaussian", "spike_slab", "categorical"])
def test_a_learned_prior_is_measured_as_by_single_records(pairs, family):
    model = make_vae(**MODELS["paired"], family=family, latent_dim=3, categories=4)
    width = model.family.noise_width
    found = measure(Passes(model, token_budget=512), pairs, samples=1, iw_samples=2, seed=0)
    weights = found.log_weights
    first, second, drawn = (
        torch.from_numpy(
            normal(0, purpose, [(s, key) for key in pairs.content_keys.tolist()], width)
        )
        for purpose, s in ((LATENT, 0), (LATENT, 1), (PRIOR, 0))
    )
    for i in (0, 7, 39):
        q, p, rec = single(model, pairs, i)
        assert float(found.kl[i].sum()) == pytest.approx(float(q.kl(p).sum()), rel=1e-3)
        assert float(found.rec[i]) == pytest.approx(
            float(rec(q.sample(first[i : i + 1]))), rel=1e-3
        )
        z = p.sample(drawn[i : i + 1])
        assert float(found.rec_prior[i]) == pytest.approx(float(rec(z)), rel=1e-3)
        z = q.sample(second[i : i + 1])
        expected = -rec(z) + p.log_prob(z)[0] - q.log_prob(z)[0]
        assert float(weights[1, i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-2)


@pytest.mark.parametrize("count", [1, 40])
def test_against_priors_that_differ_there_is_no_information(pairs, count):
    split = pairs.select(range(count))
    passes = Passes(make_vae(**MODELS["paired"]), token_budget=512)
    found, _ = evaluate(passes, split, samples=1, more=pairs)
    for name in ("mi", "mi_upper", "mi_cap", "marginal_kl"):
        assert math.isnan(found[name])
        assert "differs by sentence" in found["undefined"][name]
    assert found["mi_posteriors"] == found["mi_sentences"] == 0
    lines = [line for line in result_table("test", found).splitlines() if " mi " in line]
    assert ["-" in line and "differs by sentence" in line for line in lines] == [True]
    fixed, _ = evaluate(Passes(make_vae(conditional=True), token_budget=512), pairs, samples=1)
    assert fixed["mi"] > 0
    assert "undefined" not in fixed


def run(place, kind, output, **options):
    return evaluate_directory(
        str(place / kind),
        str(place / f"{kind}.jsonl"),
        output=str(output),
        max_tokens=40,
        **COLUMNS[kind] | options,
    )


@pytest.fixture(scope="module")
def found(place):
    before = dict(os.environ)
    results = {kind: run(place, kind, place / "out" / kind) for kind in ("relations", "tagged")}
    results["paired"] = run(place, "paired", place / "out" / "paired", iw_samples=2)
    os.environ.clear()
    os.environ.update(before)
    return results


@pytest.mark.parametrize("kind", BEDS)
def test_what_is_null_is_null_in_the_file(found, place, kind):
    text = (place / "out" / kind / "metrics.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    saved = json.loads(text)["test"]
    assert (saved["mi"] is None) == (kind == "paired")
    shown = (place / "out" / kind / "report.html").read_text()
    for title in ("Generated sentences (greedy, z from the prior)", "From the prior"):
        assert title in shown


def test_what_is_measured_of_each_kind(found):
    paired, relations, tagged = (found[kind] for kind in ("paired", "relations", "tagged"))
    assert paired["adherence"] == 0  # the model knows nothing
    assert paired["triples"] == 0
    assert paired["conditions"] == len({each.record["condition"] for each in BEDS["paired"]})
    assert paired["outputs"] == 10 * paired["conditions"]
    assert "greedy" in paired["policies"]["generated sentences"]
    assert "only z varies" in paired["policies"]["generated sentences"]
    assert relations["outputs"] == tagged["outputs"] == 500
    assert relations["labelled"] == relations["sentences"] == 60
    assert relations["label_values"] == 8
    assert {"b3_f1", "v_measure", "ari", "b3_f1_random"} <= set(relations)
    sizes = np.bincount([each.record["label"] for each in BEDS["relations"]])
    precision = float((sizes**2).sum()) / 60**2
    assert relations["b3_f1_one_cluster"] == pytest.approx(2 * precision / (precision + 1))
    assert tagged["class_majority"] == pytest.approx(
        max(
            np.mean([each.record["label"] == name for each in BEDS["tagged"]])
            for name in ("none", "occupation")
        )
    )
    assert tagged["tagged"] == tagged["labelled"] == 60
    assert tagged["entities"] == sum(
        tag.startswith("B-") for each in BEDS["tagged"] for tag in each.record["tags"]
    )
    for name in ("b3_f1", "b3_f1_one_cluster", "b3_f1_random", "v_measure", "ari"):
        assert f"\n  {name} " in table(relations)
        assert f"\n  {name} " in result_table("test", relations)
    for name in ("class_accuracy", "class_majority", "entity_f1"):
        assert f"\n  {name} " in result_table("test", tagged)
    assert tagged["probes"]["label"]["classes"] == 2


def test_the_order_of_the_records_changes_nothing(found, place, tmp_path):
    for kind in ("paired", "relations"):
        lines = (place / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{kind}.jsonl").write_text("".join(lines[::-1]))
        os.symlink(place / kind, tmp_path / kind)
        again = run(tmp_path, kind, tmp_path / "out", batch_tokens=2000)
        for name, value in again.items():
            if isinstance(value, float):
                expected = pytest.approx(found[kind][name], rel=1e-4, abs=1e-4, nan_ok=True)
                assert value == expected, name
        if kind == "relations":
            before, after = (dict(each["probes"]["label"]) for each in (found[kind], again))
            assert after.pop("se") == pytest.approx(before.pop("se"))
            assert after == pytest.approx(before)


def test_records_without_a_label_are_left_out_of_probes(place, tmp_path):
    rows = [each.record for each in BEDS["tagged"]]
    for i in range(0, 60, 2):
        rows[i] = {**rows[i], "label": None, "tags": None}
    os.symlink(place / "tagged", tmp_path / "tagged")
    (tmp_path / "tagged.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    few = run(tmp_path, "tagged", tmp_path / "out")
    assert few["probes"]["label"]["sentences"] == few["labelled"] == few["tagged"] == 30
    assert few["sentences"] == 60
    for row in rows[6:]:
        row["label"] = None
    (tmp_path / "tagged.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    none = run(tmp_path, "tagged", tmp_path / "out")
    assert "probes" not in none
    assert any("no probe of the label" in warning for warning in none["warnings"])
    assert none["labelled"] == 3


def test_two_ranks_change_nothing(found, place, tmp_path):
    (tmp_path / "command.py").write_text(
        "import sys\nfrom dsvae.cli import main\nsys.exit(main())\n"
    )
    words = ("--test_file", place / "paired.jsonl", "--condition_column", "condition")
    more = ("--output", tmp_path / "out", "--max_tokens", "40", "--iw_samples", "2")
    two = start(
        *("evaluate", place / "paired", *words, *more), ranks=2, script=tmp_path / "command.py"
    )
    try:
        output = [process.communicate(timeout=240) for process in two.processes]
    finally:
        two.kill()
    assert [process.returncode for process in two.processes] == [0, 0], output
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())["test"]
    for name, value in saved.items():
        if isinstance(value, float):
            assert value == pytest.approx(found["paired"][name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("paired", {"condition_column": None}, "reads conditions: .*--condition_column"),
        ("paired", {"condition_column": "conditon"}, "did you mean"),
        ("relations", {"condition_column": None}, "reads conditions: .*--condition_column"),
        ("tagged", {"condition_column": "text"}, "reads no conditions: leave out"),
        ("relations", {"tags_column": "text"}, "predicts no tags: .*--tags_column"),
        ("tagged", {"label_column": "text"}, "label .* is not among those of the training"),
        ("tagged", {"test_file": None}, "--label_column is given without --test_file"),
        ("tagged", {"labels_file": "x"}, "use one of them"),
    ],
)
def test_bad_columns(place, tmp_path, kind, change, message):
    arguments = {"test_file": str(place / f"{kind}.jsonl"), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message) as raised:
        evaluate_directory(str(place / kind), **arguments | COLUMNS[kind] | change)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
