"""Models that do not fit: loaded and exported part by part, trained with states in host
memory and on a disk."""

import json
import pickle
import shutil

import pytest
import torch
import yaml
from benchmarks.loading import MIB, measure, save_t5
from launch import CONFIGS, TINY, numbers, rows, start, train
from safetensors.torch import load_file

STEPS = (
    "--phase1.steps",
    "3",
    "--phase2.steps",
    "3",
    "--phase1.freeze_decoder",
    "--precision",
    "fp32",
)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A run at ZeRO 2, where every rank builds the whole model, from a configuration:
    fresh weights."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / "zero2.json",
        "--output_dir",
        out,
        *STEPS,
        ranks=2,
    )
    return out


@pytest.mark.parametrize("name", ["zero3", "zero2_offload", "zero3_offload"])
def test_sharded_and_offloaded_runs_give_the_plain_losses(name, tiny, plain, tmp_path):
    """Fresh weights, drawn on rank 0 and sharded at once, are those that a whole model
    starts from; offload changes nothing."""
    out = tmp_path / "run"
    train(
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / f"{name}.json",
        "--output_dir",
        out,
        *STEPS,
        ranks=2,
    )
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
    assert "resuming from" in train(*common, "--output_dir", cut, ranks=2).stdout
    assert [row["step"] for row in rows(cut)] == list(range(1, 15))
    assert numbers(cut) == numbers(tmp_path / "uncut")


def test_no_rank_holds_the_whole_model(tmp_path):
    """Two ranks, float32, 139 M parameters: each stays below 0.65 of the model's bytes,
    all pages of files counted.

    Half is the rank's own part; the largest tensor, which passes through whole, is 5%
    of this model.
    """
    save_t5(tmp_path, "medium", "200MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for figures in measure(tmp_path, CONFIGS / "zero3.json", load_only=True, timeout=120):
        model = figures["parameters"] * 4 / MIB
        assert model > 500
        assert 0.45 * model < figures["load"]["peak"] - figures["base"] < 0.65 * model


# Parts of more than 1 MiB a rank, below which DeepSpeed keeps everything in memory; odd
# sizes, so that gradients lie anywhere.
WIDE = {**TINY["model"]["t5"], "d_model": 514, "d_ff": 1051}


@pytest.fixture(scope="module")
def wide(cache_dir, tmp_path_factory):
    """(arguments of a run with the model WIDE, a ds_config that keeps it on a disk,
    that disk's directory)."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(
            "offload to a disk needs libaio's headers and a C++ compiler (apt-get install "
            "libaio-dev g++)"
        )
    directory = tmp_path_factory.mktemp("wide")
    data = {**TINY["data"], "cache_dir": str(cache_dir)}
    (directory / "wide.yaml").write_text(
        yaml.safe_dump({**TINY, "data": data, "model": {**TINY["model"], "t5": WIDE}})
    )
    disk = directory / "disk"
    disk.mkdir()
    ds_config = json.loads((CONFIGS / "zero3_nvme.json").read_text())
    zero = ds_config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        zero[section]["nvme_path"] = str(disk)
    # DeepSpeed would keep up to 1e9 weights in memory all the same
    zero["offload_param"]["max_in_cpu"] = 0
    zero["sub_group_size"] = 1_000_000  # several, which share the swap buffers
    (directory / "nvme.json").write_text(json.dumps(ds_config))
    del zero["offload_optimizer"], zero["offload_param"]
    (directory / "memory.json").write_text(json.dumps(ds_config))
    # losses that fall: rounding grows where they explode
    rates = ("--phase1.lr", "1e-4", "--phase2.lr", "1e-3", "--phase2.lr_scale", "rms")
    return (
        ("--config", directory / "wide.yaml", "--checkpoint_every", "2", *rates, *STEPS),
        directory,
        disk,
    )


@pytest.mark.timeout(1500)
def test_states_on_a_disk_give_the_losses_of_those_in_memory_and_survive_a_kill(wide, tmp_path):
    """Weights, gradients and moments on a disk; killed in phase 2, it goes on bit by
    bit there, and within rounding in memory."""
    common, configs, disk = wide

    def run(name, ds_config, **options):
        train(
            *common,
            "--ds_config",
            configs / f"{ds_config}.json",
            "--output_dir",
            tmp_path / name,
            ranks=2,
            **options,
        )
        return [row["loss"] for row in rows(tmp_path / name)]

    in_memory = run("memory", "memory")
    on_disk = run("uncut", "nvme", timeout=1400)  # the first use compiles DeepSpeed's I/O: minutes
    assert len(on_disk) == 6
    assert on_disk == pytest.approx(in_memory, rel=2e-6, abs=2e-5)
    assert list(disk.iterdir()) == []

    cut = start(
        *common, "--ds_config", configs / "nvme.json", "--output_dir", tmp_path / "cut", ranks=2
    )
    cut.wait_for(tmp_path / "cut" / "checkpoints" / "phase2-step00000002" / "COMPLETE")
    cut.kill()
    assert not (tmp_path / "cut" / "metrics.json").exists()
    left = {path.name for path in disk.rglob("*.swp")}
    # else this test shows nothing
    for kind in ("exp_avg-", "exp_avg_sq-", "_gradient_", "_param."):
        assert any(kind in name for name in left), left
    shutil.copytree(tmp_path / "cut", tmp_path / "moved")
    assert run("cut", "nvme") == on_disk
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("cut", "uncut", "memory")
    ]
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key
        assert (weights[2][key] - value).abs().mean() < 1e-5, key
    assert list(disk.iterdir()) == []
    assert run("moved", "memory") == pytest.approx(in_memory, rel=2e-6, abs=2e-5)


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
        "--config",
        tmp_path / "config.yaml",
        "--ds_config",
        CONFIGS / "zero3.json",
        "--output_dir",
        tmp_path / "run",
        ranks=2,
    )
    assert refused.wait(120) == 2, refused.stderr[-3000:]
    assert [p.returncode for p in refused.processes] == [2, 2]
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("dsvae: error:")]
    assert f"model {model}: no file named model.safetensors" in line
    assert "pickles" in line
    assert not (tmp_path / "executed").exists()


def save_t5_without_weights(directory):
    from small_models import small_tokenizer
    from transformers import T5Config

    T5Config(
        vocab_size=200,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    ).save_pretrained(directory)
    small_tokenizer(["a small cat sees the old dog", "an old dog sees a cat"], 40).save_pretrained(
        directory
    )
