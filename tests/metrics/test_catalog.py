"""The list of metrics is complete, and everything that shows a metric reads it."""

import csv
import json

import pytest
import yaml
from small_models import SMALL, make_vae, small_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsvae.cli import main
from dsvae.config import RunConfig
from dsvae.data.grammar import generate
from dsvae.data.record_tokens import tokenize
from dsvae.data.records import Columns
from dsvae.inference.passes import Passes
from dsvae.metrics import catalog, clustering, diversity, tagging
from dsvae.metrics.catalog import COLUMN, MAIN, METRICS, SUMMARY, Metric
from dsvae.metrics.evaluate import evaluate
from dsvae.reports.card import write_card
from dsvae.reports.evaluation import evaluate_sentences
from dsvae.reports.html import write_report
from dsvae.reports.sentences import read
from dsvae.reports.table import result_table, table
from dsvae.reports.training_log import Reporter

TEXTS = [drawn.text for drawn in generate(60, seed=3)]
NAMES = {metric.name for metric in METRICS}


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(TEXTS, SMALL["vocab_size"])


@pytest.fixture(scope="module")
def evaluation(tokenizer):
    """A whole evaluation on sentences with known factors: (sentences, its result)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsvae.reports.sentences.BUILTIN_SENTENCES", 120)
        text = read(None, None, Columns(), make_vae().config, tokenizer, 64)
    options = {"samples": 1, "iw_samples": 2, "max_tokens": 64, "seed": 0}
    found = evaluate_sentences(Passes(make_vae(), token_budget=4096), tokenizer, text, **options)
    found.metrics["model"] = "a model"
    return text, found


def test_names_are_unique():
    assert len(NAMES) == len(METRICS)


@pytest.mark.parametrize("injection", ["memory", "none"])
def test_every_metric_of_a_run_has_an_entry(tokenizer, injection):
    split = tokenize(TEXTS, tokenizer, 64, "test")[0]
    model = make_vae(injection=injection)
    found, _ = evaluate(Passes(model, token_budget=4096), split, samples=1, iw_samples=2)
    assert set(found) - {"se", "warnings"} <= NAMES
    assert set(found["se"]) <= NAMES


def test_every_number_of_an_evaluation_has_an_entry(evaluation):
    metrics = evaluation[1].metrics
    inner = metrics["disentanglement"]
    assert {name for name, value in metrics.items() if isinstance(value, (int, float))} <= NAMES
    scores = {name for name, value in inner.items() if isinstance(value, float)}
    assert {f"disentanglement.{name}" for name in scores} <= NAMES
    assert {"kl_per_dim", "au_curve", "probes"} <= NAMES


def test_every_number_of_outputs_clusters_and_tags_has_an_entry():
    found = [
        diversity.of_outputs(TEXTS[:3], seed=0),
        diversity.of_conditions([TEXTS[:3]], [TEXTS[3:5]]),
        clustering.agreement([0, 1, 1], [0, 0, 1]),
        tagging.of_entities([["B-X", "O"]], [["B-X", "O"]]),
        tagging.of_classes(["a", "b"], ["a", "a"], positive="a"),
    ]
    for metrics in found:
        assert set(metrics) - {"se", "entity_types"} <= NAMES
        assert set(metrics["se"]) <= set(metrics)


def test_a_new_entry_is_shown_everywhere(evaluation, monkeypatch, tmp_path):
    """A metric needs a value and an entry, and nothing else."""
    text, found = evaluation
    new = Metric(
        "made_up",
        "furlongs",
        "how far the sentence goes",
        places=SUMMARY | MAIN,
        section="Made up section",
    )
    monkeypatch.setattr(catalog, "METRICS", (*METRICS, new))
    metrics = {**found.metrics, "made_up": 12.345678}
    metrics["se"] = {**metrics["se"], "made_up": 0.25}

    (line,) = (line for line in result_table("test", metrics).splitlines() if "made_up" in line)
    assert line.split() == ["made_up", "12.346", "furlongs", *new.meaning.split()]
    (line,) = (line for line in table(metrics).splitlines() if "made_up" in line)
    assert line.split() == ["made_up", "12.346", "±", "0.250", "furlongs", *new.meaning.split()]
    assert "Made up section" in table(metrics)

    write_card(tmp_path / "card.md", RunConfig(), make_vae().config, metrics, [], [])
    assert new.meaning in (tmp_path / "card.md").read_text()
    write_report(tmp_path / "report.html", metrics, found.measured, text, found.pairs, found.prior)
    report = (tmp_path / "report.html").read_text()
    for part in ("made_up", "12.346", "furlongs", new.meaning, "Made up section"):
        assert part in report

    run = tmp_path / "run"
    run.mkdir()
    reporter = Reporter(RunConfig(output_dir=str(run)), enabled=True)
    reporter.open(1)
    reporter.evaluation(5, 2, "valid", metrics)
    reporter.evaluation(5, 2, "test", metrics)
    reporter.close(metrics)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag in ("main/made_up", "test/made_up"):
        assert [event.value for event in events.Scalars(tag)] == [pytest.approx(12.345678)]


def test_compare_shows_a_new_entry(monkeypatch, tmp_path, capsys):
    new = Metric("made_up", "furlongs", "how far it goes", "higher", COLUMN)
    monkeypatch.setattr(catalog, "METRICS", (*METRICS, new))
    for name, value in (("a", 1.5), ("b", 2.5)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"ds_config": "zero2.json"}))
        metrics = {"rec": 3.0, "kl": 1.0, "kl_per_dim": [1.0], "made_up": value}
        (run / "metrics.json").write_text(json.dumps({"test": metrics}))
    out = tmp_path / "out"
    words = ["--output", str(out), "--sort_by", "made_up"]
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *words]) == 0
    printed = capsys.readouterr().out
    assert "made_up ↑" in printed.splitlines()[0]
    assert printed.index("| b ") < printed.index("| a ")  # the highest first
    assert "- `made_up` (furlongs, higher is better): how far it goes" in printed
    with (out / "comparison.csv").open(newline="") as file:
        assert [row["made_up"] for row in csv.DictReader(file)] == ["2.5", "1.5"]
