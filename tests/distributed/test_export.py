"""The model of a checkpoint against what the same run exported from its live engine, at
every ZeRO stage; and what goes wrong."""

import json
import shutil

import pytest
import torch
import yaml
from launch import CONFIGS, TINY, train
from safetensors.torch import load_file
from small_models import make_vae, small_tokenizer
from transformers import AutoTokenizer

from dsvae import T5VAE
from dsvae.cli import main
from dsvae.data.grammar import draw
from dsvae.engine import checkpoint
from dsvae.engine.checkpoint import COMPLETE, find
from dsvae.errors import UserError
from dsvae.export import export_checkpoint
from dsvae.pretrained import load

# Every checkpoint stays, each measured on validation text; the decoder is frozen in
# phase 1.
OPTIONS = {
    "phase1": {"steps": 2, "lr": 1e-3, "freeze_decoder": True},
    "phase2": {**TINY["phase2"], "steps": 4},
    "eval_every": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 9,
}
FROZEN, MIDDLE, LAST = "phase1-step00000002", "phase2-step00000002", "phase2-step00000004"
RUNS = {"zero0": ("bf16", 1), "zero1": ("fp32", 1), "zero2": ("bf16", 2), "zero3": ("bf16", 2)}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that a run begins with, of weights that bfloat16 cannot hold: a cast
    would show."""
    directory = tmp_path_factory.mktemp("start")
    model = make_vae("t5 v1.1")
    assert any((w != w.bfloat16().float()).any() for w in model.parameters())
    model.save_pretrained(directory)
    small_tokenizer([sentence.text for sentence in draw(300, 0)], 60).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def runs(start, cache_dir, tmp_path_factory):
    """Finished runs; a run of a stage is made when it is first asked for. ZeRO 2 begins
    with tied weights, the others without."""
    made = {}

    def run(stage):
        if stage not in made:
            precision, ranks = RUNS[stage]
            directory = tmp_path_factory.mktemp(stage) / "run"
            config = {**TINY, **OPTIONS, "data": {**TINY["data"], "cache_dir": str(cache_dir)}}
            if stage != "zero2":
                config["model"] = {"name": str(start), "latent_dim": 6, "memory_slots": 2}
            path = directory.with_name("config.yaml")
            path.write_text(yaml.safe_dump(config))
            command = (
                "--config",
                path,
                "--ds_config",
                CONFIGS / f"{stage}.json",
                "--precision",
                precision,
            )
            train(*command, "--output_dir", directory, ranks=ranks)
            made[stage] = directory
        return made[stage]

    return run


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run, to be harmed."""
    return shutil.copytree(runs("zero2"), tmp_path / "run")


def assert_same_model(found, expected):
    """Weights bit by bit, and every other file but what is told of the run."""
    a, b = (load_file(directory / "model.safetensors") for directory in (found, expected))
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == torch.float32
        assert torch.equal(a[name], b[name]), name
    names = {path.name for path in expected.iterdir()} - {"model.safetensors", "README.md"}
    assert {path.name for path in found.iterdir()} == names | {"model.safetensors", "README.md"}
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("stage", list(RUNS))
def test_the_same_model_as_the_run_exported(runs, stage, tmp_path):
    run = runs(stage)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert_same_model(
        export_checkpoint(run, "latest", tmp_path / "last", pytest.fail), run / "model"
    )
    assert_same_model(
        export_checkpoint(run, FROZEN, tmp_path / "frozen", pytest.fail), run / "phase1" / "model"
    )
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before  # only read

    middle = export_checkpoint(run, MIDDLE, tmp_path / "middle", pytest.fail)
    first, second, third = (
        load_file(d / "model.safetensors")
        for d in (run / "phase1" / "model", middle, run / "model")
    )
    assert not torch.equal(second["shared.weight"], first["shared.weight"])
    assert not torch.equal(second["shared.weight"], third["shared.weight"])


def test_the_command(run, capsys):
    assert main(["export", str(run), "--checkpoint", MIDDLE]) == 0
    directory = run / "exports" / MIDDLE
    assert capsys.readouterr().out == f"{directory}\n"
    model, tokenizer = load(directory)
    batch = tokenizer(["the cats see a dog"], return_tensors="pt")
    assert torch.isfinite(model(**batch, labels=batch.input_ids).logits).all()
    assert T5VAE.from_pretrained(directory).lm_head.weight.data_ptr() != 0
    assert len(AutoTokenizer.from_pretrained(directory)) == len(tokenizer)
    valid = next(each for each in find(run / "checkpoints") if each.directory.name == MIDDLE).meta[
        "valid"
    ]
    card = (directory / "README.md").read_text()
    assert "step 2 of 4 of phase 2, a checkpoint\n- latent: 6 dimensions, Gaussian" in card
    assert f"rec + kl {valid:.2f} nats" in card


def test_large_models_are_written_in_shards(runs, tmp_path):
    run = runs("zero3")
    directory = export_checkpoint(
        run, "latest", tmp_path / "model", pytest.fail, max_shard_bytes=40_000
    )
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) < 44_000
    sharded, whole = (
        T5VAE.from_pretrained(directory).state_dict(),
        T5VAE.from_pretrained(run / "model").state_dict(),
    )
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def set_valid(run, values):
    for found in find(run / "checkpoints"):
        record = json.loads((found.directory / COMPLETE).read_text())
        record["meta"]["valid"] = values[found.directory.name]
        (found.directory / COMPLETE).write_text(json.dumps(record))


def test_the_best_is_of_the_running_phase(run, tmp_path):
    set_valid(run, {FROZEN: 1.0, MIDDLE: 7.0, LAST: 8.0})
    assert export_checkpoint(run, "best", None, pytest.fail) == run / "exports" / MIDDLE
    assert export_checkpoint(run, "latest", None, pytest.fail) == run / "exports" / LAST
    set_valid(run, {FROZEN: 1.0, MIDDLE: None, LAST: None})
    refused(run, "best", tmp_path / "x", "no checkpoint of phase 2 was measured")


def refused(run, which, output, *what):
    with pytest.raises(UserError) as caught:
        export_checkpoint(run, which, output, pytest.fail)
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in what), line
    parent = run if output is None else output.parent
    assert not any(".tmp" in path.name for path in parent.rglob("*"))


def flip(directory):
    path = next(directory.glob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path


def test_a_damaged_checkpoint_is_named(run, tmp_path):
    path, lines = flip(run / "checkpoints" / LAST), []
    assert export_checkpoint(run, "latest", None, lines.append).name == MIDDLE
    assert len(lines) == 1
    assert str(path) in lines[0]
    refused(run, LAST, tmp_path / "x", str(path), "does not match its checksum")


def test_a_checkpoint_that_its_run_removes_meanwhile(run, tmp_path, monkeypatch):
    damage = checkpoint.damage

    def then_gone(found):
        result = damage(found)
        shutil.rmtree(found.directory)
        return result

    monkeypatch.setattr(checkpoint, "damage", then_gone)
    refused(run, MIDDLE, tmp_path / "x", MIDDLE, "was removed meanwhile")
    assert not (tmp_path / "x").exists()


def test_what_is_not_there(run, tmp_path):
    refused(
        tmp_path / "none", "latest", tmp_path / "x", "is not the directory of a run", "output_dir"
    )
    refused(
        run / "checkpoints" / LAST,
        "latest",
        tmp_path / "x",
        "is not the directory of a run",
        f"did you mean {run}?",
    )
    refused(
        run,
        "phase2-step00000009",
        tmp_path / "x",
        f"latest, best, or one of {FROZEN}, {MIDDLE}, {LAST}",
    )
    refused(run, "latest", run / "model", "already exists")
    with pytest.raises(UserError, match="has no adapters"):
        export_checkpoint(run, "latest", tmp_path / "x", pytest.fail, adapters=True)
    for each in find(run / "checkpoints"):
        (each.directory / COMPLETE).unlink()
    refused(run, "latest", tmp_path / "x", "no complete checkpoint")


def test_frozen_weights_that_have_changed_since(runs, start, tmp_path):
    run = shutil.copytree(runs("zero3"), tmp_path / "run")
    other = make_vae("t5 v1.1", seed=1)
    other.save_pretrained(shutil.copytree(start, tmp_path / "other"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(start), str(tmp_path / "other")))
    refused(run, FROZEN, tmp_path / "x", "is frozen", "has changed since the run began")
    # takes nothing of it
    assert_same_model(export_checkpoint(run, LAST, tmp_path / "last", pytest.fail), run / "model")


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsvae.engine.model_directory.ModelDirectory.finish", fail)
    refused(run, "latest", tmp_path / "x", "cannot be written", "make room")
