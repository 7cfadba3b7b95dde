"""Conditional models and models with heads on several ranks: the same losses whatever the
split, a run that goes on, its evaluation, and its exports."""

import json
import math
import shutil

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, TINY, numbers, rows, train
from safetensors.torch import load_file

from dsvae import T5VAE
from dsvae.config import load
from dsvae.data.batches import TrainingBatches
from dsvae.data.prepared import load_prepared, prepare
from dsvae.export import export_checkpoint
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import evaluate
from dsvae.modeling.crf import IGNORE

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "old", "new", "small", "big"]
TAGS = {"cat": "B-X", "dog": "B-X", "small": "I-X", "big": "I-X"}
COLUMNS = {"label_column": "label", "tags_column": "tags"}
PHASE = {"lr": 1e-3, "adam_eps": 1e-4, "steps": 4, "deletion": 0.2}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Short sentences have a label, tags or both. Long ones have neither, so that whole
    micro-batches have none: a micro-batch has sentences of like length."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rng = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for i in range(300):
            count = 2 + int(torch.randint(7, (), generator=rng))
            drawn = [WORDS[j] for j in torch.randint(len(WORDS), (count,), generator=rng)]
            record = {"text": " ".join(drawn), "c": ("one", "two words", "three of them")[i % 3]}
            if count < 6:
                record["label"] = None if i % 4 == 0 else ("no", "yes")["cat" in drawn]
                record["tags"] = None if i % 5 == 0 else [TAGS.get(word, "O") for word in drawn]
            file.write(json.dumps(record) + "\n")
    return path


def write_config(path, records, cache_dir, data=None, **more):
    """A configuration file; returns the arguments of its run."""
    settings = {"train_file": str(records), "batch_size": 33, "cache_dir": str(cache_dir)}
    config = {
        **TINY,
        "data": {**settings, "max_tokens": 24, **(data or {})},
        "precision": "fp32",
        **more,
    }
    path.write_text(yaml.safe_dump(config))
    return "--config", path


def prepared_of(directory):
    """The configuration of a run and its data."""
    config = load(directory / "config.yaml")
    tokenizer = str(directory / "tokenizer")
    path = prepare(config.data, tokenizer=tokenizer, vocab_size=None, seed=config.seed)
    return config, load_prepared(path)


SPLITS = [("zero0", 1, 10**6), ("zero1", 2, 60), ("zero3", 2, 60)]
SYSTEMS = {
    "classes and tags": {"data": COLUMNS, "phase1": {**PHASE, "freeze_decoder": True}},
    "clusters": {
        "data": {"condition_column": "c"},
        "model": {**TINY["model"], "clusters": 4},
        # weights that show in the loss
        "phase1": {**PHASE, "dispersion": 3.0, "skewness": 1.0},
        "phase2": {**PHASE, "dispersion": 3.0, "skewness": 1.0},
    },
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_losses_are_those_of_one_rank_and_one_micro_batch(system, records, cache_dir, tmp_path):
    given = {"phase2": {**PHASE, "free_bits": 0.2}, **SYSTEMS[system]}
    config = write_config(tmp_path / "config.yaml", records, cache_dir, **given)
    found = []
    for name, ranks, budget in SPLITS:
        out = tmp_path / f"{name}_{ranks}"
        train(
            *config,
            *("--ds_config", CONFIGS / f"{name}.json", "--output_dir", out),
            *("--data.micro_batch_tokens", budget),
            ranks=ranks,
            script=ROOT / "tests/distributed/train_alone.py",
        )
        found.append(rows(out))
    assert len(found[0]) == 8
    heads = ["class_nats", "tag_nats"] if system == "classes and tags" else []
    for row in found[0][:4]:  # phase 1
        if heads:
            total = row["rec"] + row["class_nats"] + row["tag_nats"]
            assert row["loss"] == pytest.approx(total, rel=1e-5)
        else:
            # The learned prior has its KL here too. The mean entropy of a sentence's
            # cluster is at most the entropy of the mean, which is at most ln 4.
            assert -3 * math.log(4) < row["loss"] - row["rec"] - row["kl"] < 0
    for other in found[1:]:
        for name in ("loss", "rec", "kl", "grad_norm", *heads):
            expected = [row[name] for row in found[0]]
            assert [row[name] for row in other] == pytest.approx(expected, rel=2e-4)
    if heads:
        data = prepared_of(tmp_path / "zero1_2")[1]
        assert 0 < micro_batches_without_labels(data, budget=60, world_size=2) < 1


def micro_batches_without_labels(data, budget, world_size):
    """The share of the micro-batches of a step on rank 0 with neither a label nor tags."""
    step = TrainingBatches(
        data.splits["train"],
        batch_size=33,
        token_budget=budget,
        noise_width=6,
        deletion=0.0,
        seed=0,
        rank=0,
        world_size=world_size,
        pad_id=0,
    ).step(0)
    none = [
        bool((batch.class_labels == IGNORE).all() and (batch.tag_labels == IGNORE).all())
        for batch in step.micro_batches
    ]
    return sum(none) / len(none)


@pytest.fixture(scope="module")
def run(records, cache_dir, tmp_path_factory):
    """A run of the real command with everything at once: a learned prior, classes, tags
    and clusters, on two ranks at ZeRO 3, with a checkpoint every second step. (its
    directory, its arguments but for --output_dir)"""
    directory = tmp_path_factory.mktemp("run")
    config = write_config(
        directory / "config.yaml",
        records,
        cache_dir,
        {"condition_column": "c", **COLUMNS, "micro_batch_tokens": 300},
        model={**TINY["model"], "clusters": 3},
        phase1={**PHASE, "freeze_decoder": True},
        phase2={**PHASE, "beta": TINY["phase2"]["beta"]},
        eval={"shown": 2, "iw_samples": 4, "batch_tokens": 200},
        checkpoint_every=2,
        keep_checkpoints=9,
    )
    arguments = (*config, "--ds_config", CONFIGS / "zero3.json")
    train(*arguments, "--output_dir", directory / "run", ranks=2)
    return directory / "run", arguments


def test_the_evaluation_on_two_ranks_is_that_of_the_exported_model_on_one(run):
    directory, _ = run
    model = T5VAE.from_pretrained(directory / "model")
    assert (model.config.classes, model.config.tags) == (["no", "yes"], ["B-X", "I-X", "O"])
    assert (model.config.prior, model.config.clusters) == ("learned", 3)
    config, data = prepared_of(directory)
    alone, _ = evaluate(
        Passes(model, token_budget=10_000),
        data.splits["test"],
        samples=config.eval.samples,
        iw_samples=config.eval.iw_samples,
        more=data.splits["train"],
    )
    found = json.loads((directory / "metrics.json").read_text())["test"]
    scores = ("class_accuracy", "entity_f1", "b3_f1", "rec_shuffled", "rec_prior", "nll_iw")
    for name in ("rec", "kl", "kl_per_dim", "au", *scores):
        assert found[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert found["mi"] is None  # one prior per condition


def test_a_run_that_was_cut_in_phase_2_goes_on_as_if_it_had_not_been(run):
    directory, arguments = run
    cut = shutil.copytree(directory, directory.with_name("cut"))
    (cut / "metrics.json").unlink()
    for name in ("model", "checkpoints/phase2-step00000004"):
        shutil.rmtree(cut / name)
    assert "resuming from" in train(*arguments, "--output_dir", cut, ranks=2).stdout
    assert numbers(cut) == numbers(directory)
    assert (cut / "metrics.json").read_text() == (directory / "metrics.json").read_text()
    ours, uncut = (load_file(each / "model" / "model.safetensors") for each in (cut, directory))
    assert ours.keys() == uncut.keys()
    assert all(torch.equal(ours[name], uncut[name]) for name in uncut)


@pytest.mark.parametrize(
    ("checkpoint", "same_as"),
    [("latest", "model"), ("phase1-step00000004", "phase1/model"), ("phase2-step00000002", None)],
)
def test_a_checkpoint_is_exported_as_the_run_itself_does_it(run, checkpoint, same_as, tmp_path):
    directory, _ = run
    exported = export_checkpoint(directory, checkpoint, tmp_path / "model", pytest.fail)
    model = T5VAE.from_pretrained(exported)
    if same_as is not None:
        expected = load_file(directory / same_as / "model.safetensors")
        assert load_file(exported / "model.safetensors").keys() == expected.keys()
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
        for name in ("config.json", "tokenizer.json"):
            ours, theirs = exported / name, directory / same_as / name
            assert ours.read_bytes() == theirs.read_bytes()
    ids = torch.tensor([[5, 6, 1, 7, 8, 1], [9, 1, 5, 1, 0, 0]])
    out = model(
        ids,
        (ids != 0).long(),
        labels=torch.tensor([[7, 8, 1], [5, 1, IGNORE]]),
        condition_ids=torch.tensor([[5, 6, 1], [9, 1, 0]]),
        condition_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
    )
    assert out.logits.isfinite().all()
    assert out.class_logits.shape == (2, 2)
    assert out.clusters.sum(-1).tolist() == pytest.approx([1, 1])
