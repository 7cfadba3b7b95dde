"""The phase `prior` with real ranks: it trains the denoiser alone, on normalized draws of
q(z|x), in the same way whatever the ranks and the ZeRO stage; and a run that is cut goes
on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launch import CONFIGS, TINY, numbers, rows, start, train
from safetensors.torch import load_file

from dsvae import T5VAE
from dsvae.data.grammar import generate
from dsvae.export import export_checkpoint
from dsvae.generation import SentenceVAE

STEPS, TEXTS = 8, 192
SETTINGS = {
    **TINY,
    "model": {
        **TINY["model"],
        "latent_vectors": 6,
        "pooling": "chunks",
        "chunk": 4,
        "injection": "cross",
    },
    "phase": "2+prior",
    "phase2": {"steps": 3, "lr": 1e-2, "beta": {"kind": "constant", "max": 1e-3}},
    "prior": {"steps": STEPS, "width": 32, "layers": 2, "lr": 1e-2, "average": 0.6},
    "eval": {"shown": 2, "iw_samples": 0},
    "checkpoint_every": 1,
    "keep_checkpoints": 99,
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def config(cache_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    texts = [drawn.text for drawn in generate(TEXTS + 60, seed=0)]
    files = {"train_file": texts[:TEXTS], "valid_file": texts[TEXTS:-30], "test_file": texts[-30:]}
    data = {**TINY["data"], "cache_dir": str(cache_dir), "micro_batch_tokens": 128}
    del data["builtin_size"]
    for name, lines in files.items():
        (directory / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        data[name] = str(directory / f"{name}.txt")
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "data": data}))
    return path


def arguments(config, stage, directory, *more, precision="fp32"):
    given = ("--config", config, "--ds_config", CONFIGS / f"{stage}.json")
    return [*given, "--output_dir", directory, "--precision", precision, *more]


@pytest.fixture(scope="module")
def uncut(config, tmp_path_factory):
    """Two ranks at ZeRO 2."""
    directory = tmp_path_factory.mktemp("uncut") / "run"
    train(*arguments(config, "zero2", directory), ranks=2)
    return directory


def of_prior(directory):
    return [row for row in numbers(directory) if row["phase"] == 3]


def weights_of(directory):
    return load_file(directory / "model" / "model.safetensors")


def test_only_the_denoiser_trains_and_the_model_has_both(uncut):
    before = load_file(uncut / "phase2" / "model" / "model.safetensors")
    after = weights_of(uncut)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = after.keys() - before.keys()
    assert new
    assert all(name.startswith("denoiser.") for name in new)
    assert [row["step"] for row in of_prior(uncut)] == list(range(4, 4 + STEPS))
    metrics = json.loads((uncut / "metrics.json").read_text())["test"]
    assert {"rec", "flow_loss", "flow_loss_t1"} <= metrics.keys()


def test_the_normalizer_is_that_of_the_training_texts(uncut, config):
    """Mean and deviation of each number over q(z|x), all places of a text together."""
    vae = SentenceVAE.from_pretrained(str(uncut / "model"), device="cpu")
    file = yaml.safe_load(config.read_text())["data"]["train_file"]
    texts = Path(file).read_text().splitlines()
    q = vae.encode(texts)
    means, variances = q.vectors[q.valid].double(), q.tensors()["logvar"][q.valid].double().exp()
    mean = means.mean(0)
    std = (variances + means**2).mean(0).sub(mean**2).sqrt()
    for found, expected in ((vae.model.denoiser.mean, mean), (vae.model.denoiser.std, std)):
        every = expected.expand(6, -1).flatten()
        torch.testing.assert_close(found.double(), every, atol=1e-5, rtol=1e-4)


def test_a_new_denoiser_has_the_loss_of_predicting_nothing(uncut):
    """E (u - n)^2 = 2 per number, because both are normalized."""
    first = of_prior(uncut)[0]["flow_loss"]
    assert first == pytest.approx(2.0, abs=0.25)


def test_the_exported_weights_are_the_averages(uncut):
    """Recomputed from the float32 weights of each checkpoint: step t (from 0) keeps
    min(0.6, t / (t + 9))."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    average = {}
    for step in range(STEPS):
        tag = f"phase3-step{step + 1:08d}"
        weights = get_fp32_state_dict_from_zero_checkpoint(str(uncut / "checkpoints"), tag)
        stays = min(0.6, step / (step + 9))
        for name, value in weights.items():
            if name.startswith("denoiser."):
                before = average.get(name, value)
                average[name] = stays * before + (1 - stays) * value
        if step == 4:
            saved = load_file(uncut / "checkpoints" / tag / "averages.safetensors")
            for name, value in saved.items():
                torch.testing.assert_close(value, average[f"denoiser.{name}"], atol=1e-6, rtol=1e-5)
    found = weights_of(uncut)
    assert len(average) > 20
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("step", [5, STEPS])
def test_a_checkpoint_is_exported_with_both_parts(uncut, tmp_path, step):
    name = f"phase3-step{step:08d}"
    export_checkpoint(uncut, name, tmp_path / "model", print)
    found, expected = load_file(tmp_path / "model" / "model.safetensors"), weights_of(uncut)
    averages = load_file(uncut / "checkpoints" / name / "averages.safetensors")
    assert found.keys() == expected.keys()
    for weight, value in found.items():
        own = averages.get(weight.removeprefix("denoiser."), expected[weight])
        assert torch.equal(value, own)
    config, whole = (
        json.loads((directory / "config.json").read_text())
        for directory in (tmp_path / "model", uncut / "model")
    )
    assert config == whole


def test_the_model_generates(uncut):
    vae = SentenceVAE.from_pretrained(str(uncut / "model"), device="cpu")
    assert len(vae.sample(3, source="flow", steps=3, seed=0, max_new_tokens=5)) == 3
    assert T5VAE.from_pretrained(uncut / "model").config.denoiser["width"] == 32


def same_as(uncut, directory, tolerance=TOLERANCE):
    expected, found = of_prior(uncut), of_prior(directory)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["flow_loss"] == pytest.approx(other["flow_loss"], abs=tolerance)
    (mine,), (theirs,) = rows(directory, "test"), rows(uncut, "test")
    assert mine["flow_loss"] == pytest.approx(theirs["flow_loss"], abs=tolerance)
    reference = weights_of(uncut)
    for name, value in weights_of(directory).items():
        if name.startswith("denoiser."):
            torch.testing.assert_close(value, reference[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "ranks", "at"),
    [("zero0", 1, 0), ("zero3", 2, 4), ("zero1", 1, 4), ("zero2", 2, 6)],
)
def test_a_cut_run_goes_on_in_another_shape(config, uncut, tmp_path, stage, ranks, at):
    """From the checkpoint of a step of the phase, or from the model between the phases, as
    after a kill."""
    directory = tmp_path / "run"
    shutil.copytree(uncut, directory)
    shutil.rmtree(directory / "model")
    (directory / "metrics.json").unlink()
    for checkpoint in (directory / "checkpoints").glob("phase3-*"):
        if int(checkpoint.name[-8:]) > at:
            shutil.rmtree(checkpoint)
    run = train(*arguments(config, stage, directory), ranks=ranks)
    assert f"phase prior: {STEPS} steps" in run.stdout
    assert ("resuming from" in run.stdout) == (at > 0)
    same_as(uncut, directory)


def test_labels_and_conditions_on_two_ranks_in_bf16(cache_dir, tmp_path):
    """At ZeRO 3, with queries and a learned prior, which the flow takes the place of."""
    file = tmp_path / "train.jsonl"
    rows_ = [
        {"text": drawn.text, "condition": drawn.text.split()[1], "label": ("no", "yes")[i % 2]}
        for i, drawn in enumerate(generate(120, seed=0))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_))
    model = {**SETTINGS["model"], "pooling": "queries", "latent_vectors": 3}
    config = tmp_path / "config.yaml"
    data = {"train_file": str(file), "condition_column": "condition", "label_column": "label"}
    data |= {"batch_size": 32, "max_tokens": 24, "cache_dir": str(cache_dir)}
    prior = {**SETTINGS["prior"], "steps": 3}
    config.write_text(yaml.safe_dump({**SETTINGS, "data": data, "model": model, "prior": prior}))
    directory = tmp_path / "run"
    train(*arguments(config, "zero3", directory, precision="bf16"), ranks=2)
    assert len(of_prior(directory)) == 3
    assert all(row["flow_loss"] == pytest.approx(2, abs=0.3) for row in of_prior(directory))
    (text,) = rows(directory, "text")[-1:]
    assert all(" -> " in each for each in text["prior"])
    vae = SentenceVAE.from_pretrained(str(directory / "model"), device="cpu")
    assert vae.model.config.denoiser["classes"] == ["no", "yes"]
    # Each vector has a normalizer of its own, and the noise of q(z|x) is part of it.
    std = vae.model.denoiser.std.view(3, -1)
    assert not torch.allclose(std[0], std[1], rtol=1e-3)
    given = {"source": "flow", "condition": "king", "label": "yes", "guidance": 2.0}
    assert len(vae.sample(2, **given, steps=2, seed=0, max_new_tokens=5)) == 2
    assert "--label" in (directory / "model" / "README.md").read_text()


def test_killed_and_alone_on_a_finished_model(config, uncut, tmp_path):
    """`--phase prior --model DIR` needs nothing else of the model's settings."""
    data = yaml.safe_load(config.read_text())["data"]
    files = [f"--{name}={data[name]}" for name in ("train_file", "valid_file", "test_file")]
    settings = [f"--prior.{name}={value}" for name, value in SETTINGS["prior"].items()]
    directory = tmp_path / "run"
    command = [
        *("--ds_config", CONFIGS / "zero2.json", "--phase", "prior", "--precision", "fp32"),
        *("--model", uncut / "phase2" / "model", "--output_dir", directory, *files, *settings),
        *("--data.batch_size", "32", "--data.micro_batch_tokens", "128", "--log_every", "1"),
        *("--data.cache_dir", data["cache_dir"], "--checkpoint_every", "2", "--eval.shown", "2"),
        *("--eval.iw_samples", "0", "--eval_every", "0"),
    ]
    run = start(*command, ranks=2)
    run.wait_for(directory / "checkpoints" / "phase3-step00000002" / "COMPLETE")
    run.kill()
    train(*command, ranks=2)
    expected = [row["flow_loss"] for row in of_prior(uncut)]
    found = of_prior(directory)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["flow_loss"] for row in found] == pytest.approx(expected, abs=TOLERANCE)
