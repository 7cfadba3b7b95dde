"""Models that do not fit: loaded and exported part by part, trained with states in host memory."""

import pickle

import pytest
import torch
import yaml
from benchmarks.loading import MIB, measure, save_t5
from launch import CONFIGS, TINY, numbers, rows, start, train
from safetensors.torch import load_file

STEPS = ("--phase1.steps", "3", "--phase2.steps", "3", "--phase1.freeze_decoder", "--precision", "fp32")


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A run at ZeRO 2, where every rank builds the whole model, from a configuration: fresh weights."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train("--config", tiny, "--ds_config", CONFIGS / "zero2.json", "--output_dir", out, *STEPS, ranks=2)
    return out


@pytest.mark.parametrize("name", ["zero3", "zero2_offload", "zero3_offload"])
def test_sharded_and_offloaded_runs_give_the_plain_losses(name, tiny, plain, tmp_path):
    """Fresh weights, drawn on rank 0 and sharded at once, are those that a whole model starts from; offload changes nothing."""
    out = tmp_path / "run"
    train("--config", tiny, "--ds_config", CONFIGS / f"{name}.json", "--output_dir", out, *STEPS, ranks=2)
    expected, found = ([row["loss"] for row in rows(d)] for d in (plain, out))
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=2e-6, abs=2e-5)
    weights = [load_file(d / "phase1" / "model" / "model.safetensors") for d in (plain, out)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        if key.startswith(("decoder.", "shared.", "lm_head.")):
            assert torch.equal(weights[1][key], value), f"{key} is frozen and not the same"
        else:
            assert (weights[1][key] - value).abs().mean() < 1e-5, key


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_a_killed_offloaded_run_goes_on_as_the_uncut_one(name, tiny, tmp_path):
    common = (
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / f"{name}.json",
        "--phase",
        "2",
        "--phase2.steps",
        "14",
        "--checkpoint_every",
        "4",
    )
    train(*common, "--output_dir", tmp_path / "uncut", ranks=2)
    cut = tmp_path / "cut"
    run = start(*common, "--output_dir", cut, ranks=2)
    run.wait_for(cut / "checkpoints" / "phase2-step00000004" / "COMPLETE")
    run.kill()
    assert not (cut / "metrics.json").exists()
    assert "going on from" in train(*common, "--output_dir", cut, ranks=2).stdout
    assert [row["step"] for row in rows(cut)] == list(range(1, 15))
    assert numbers(cut) == numbers(tmp_path / "uncut")


def test_no_rank_holds_the_whole_model(tmp_path):
    """Two ranks, float32, 139 M parameters: each stays below 0.65 of the model's bytes, all pages of files counted.

    Half is the rank's own part; the largest tensor, which passes through whole, is 5% of this model.
    """
    save_t5(tmp_path, "medium", "200MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for figures in measure(tmp_path, CONFIGS / "zero3.json", load_only=True, timeout=120):
        model = figures["parameters"] * 4 / MIB
        assert model > 500
        assert 0.45 * model < figures["load"]["peak"] - figures["base"] < 0.65 * model


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_model_in_a_pickle_is_refused_in_one_line(tmp_path, cache_dir):
    model = tmp_path / "model"
    save_t5_without_weights(model)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    config = {"model": {"name": str(model)}, "data": {**TINY["data"], "cache_dir": str(cache_dir)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    refused = start(
        "--config", tmp_path / "config.yaml", "--ds_config", CONFIGS / "zero3.json", "--output_dir", tmp_path / "run", ranks=2
    )
    assert refused.wait(120) == 2, refused.stderr[-3000:]
    assert [p.returncode for p in refused.processes] == [2, 2]
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("dsvae: error:")]
    assert f"model {model}: no file named model.safetensors" in line
    assert "pickles" in line
    assert not (tmp_path / "executed").exists()


def save_t5_without_weights(directory):
    from transformers import T5Config

    from dsvae.data.tokenization import train_tokenizer

    T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0).save_pretrained(
        directory
    )
    train_tokenizer(["a small cat sees the old dog", "an old dog sees a cat"], 40).save_pretrained(directory)
