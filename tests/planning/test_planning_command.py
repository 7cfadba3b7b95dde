"""`dsvae plan`: what it prints, and that what it prints can be run."""

import json
import shlex
from pathlib import Path

import datasets
import pytest
import yaml
from launch import TINY, train

from dsvae import config as configuration
from dsvae.cli import main
from dsvae.data.batches import TrainingBatches
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.planning.command import bytes_of

ZERO2 = shlex.split("--ds_config ds_configs/zero2.json --gradient_checkpointing false")
SHORT = shlex.split("--max_tokens 32 --batch_tokens 512 --eval_batch_tokens 512")


@pytest.fixture
def tiny_yaml(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def plan(capsys, *words, code=0):
    assert main(["plan", *words]) == code
    return capsys.readouterr()


def found(capsys, *words):
    return json.loads(plan(capsys, *words, "--json").out)


def run_config(command):
    """The configuration that dsvae/train.py would read, and the words before it."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word in ("train", "slurm/train.sbatch"))
    rest = words[at + 1 :]
    if words[at] == "train":
        assert rest[0] == "--num_gpus"
        assert int(rest[1]) > 0
        rest = rest[2:]
    return configuration.read(rest), words[: at + 1]


def test_every_shipped_file_in_order_and_the_first_that_fits(capsys):
    words = ["t5-small", *SHORT, "--gpus", "2"]
    plans = found(capsys, *words)
    order = [(Path(o["ds_config"]).stem, o["gradient_checkpointing"]) for o in plans["options"]]
    resident = ["zero0", "zero1", "zero2", "zero3"]
    offloaded = [
        (name, c)
        for name in ("zero2_offload", "zero3_offload", "zero3_nvme")
        for c in (False, True)
    ]
    assert order == [(n, False) for n in resident] + [(n, True) for n in resident] + offloaded
    assert plans["fits"] == 0
    assert plans["command"] == plans["options"][0]["command"]
    # A little memory less than the first needs: the next that needs less is taken.
    first = plans["options"][0]["gpu_bytes"]
    less = found(capsys, *words, "--gpu_memory", str(first - 1), "--margin", "0")
    assert less["fits"] == next(i for i, o in enumerate(plans["options"]) if o["gpu_bytes"] < first)


def test_the_printed_command_is_the_run_that_was_planned(capsys):
    asked = "--gradient_checkpointing true --injection both --latent_dim 16 --gpus 2"
    plans = found(capsys, "t5-small", *ZERO2[:2], *SHORT, *shlex.split(asked))
    config, start = run_config(plans["command"])
    assert start == ["dsvae", "train"]
    assert (config.ds_config, config.model.name) == ("ds_configs/zero2.json", "google-t5/t5-small")
    assert config.model.gradient_checkpointing
    lengths = config.data.max_tokens, config.data.micro_batch_tokens, config.eval.batch_tokens
    assert lengths == (32, 512, 512)
    assert (config.model.injection, config.model.latent_dim) == ("both", 16)
    # 128 sentences, 64 a GPU, 512 // 32 at once
    assert plans["micro_batch"] == {"sentences": 16, "tokens": 32, "of_a_step": 4}


def test_several_nodes_are_a_batch_job(capsys, tiny_yaml):
    words = [tiny_yaml, *ZERO2]
    command = found(capsys, *words, "--gpus", "8", "--gpus_per_node", "4")["command"]
    _, start = run_config(command)
    job = "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8"
    assert start == [*job.split(), "slurm/train.sbatch"]


def test_a_gpu_for_every_sentence_of_a_step_is_planned_and_run(capsys, tiny_yaml):
    """The run's own check takes what is printed, and refuses one rank more, as the plan
    does."""
    words = [tiny_yaml, *ZERO2]
    found_here = found(capsys, *words, *shlex.split("--gpus 8 --gpus_per_node 4 --batch_size 8"))
    config, _ = run_config(found_here["command"])
    split = TokenizedSplit(datasets.Dataset.from_dict({"input_ids": [[5, 1]] * 40}))
    batches = {"token_budget": 64, "noise_width": 2, "deletion": 0.0, "seed": 0, "rank": 0}
    batches["pad_id"] = 0
    TrainingBatches(split, batch_size=config.data.batch_size, world_size=8, **batches)
    with pytest.raises(UserError, match="every rank needs a sentence"):
        TrainingBatches(split, batch_size=config.data.batch_size, world_size=9, **batches)
    plan(capsys, *words, "--gpus", "9", "--gpus_per_node", "9", "--batch_size", "8", code=2)


def test_where_nothing_fits_it_says_what_would_and_that_is_true(capsys):
    words = ["t5-small", *ZERO2, *SHORT, "--gpu_memory", "3GB"]
    printed = plan(capsys, *words)
    assert "Nothing fits" in printed.out
    assert "deepspeed" not in printed.out
    plans = found(capsys, *words)
    assert (plans["fits"], plans["command"]) == (None, None)
    changes = plans["instead"]["changes"]
    (memory,) = (change for change in changes if change.startswith("--gpu_memory"))
    assert found(capsys, *words[:-2], *shlex.split(memory))["fits"] == 0


def test_host_memory_counts(capsys, tiny_yaml):
    words = [tiny_yaml, *ZERO2]
    assert found(capsys, *words)["fits"] == 0
    assert found(capsys, *words, "--host_memory", "1GB")["fits"] is None


def test_phase_1_with_a_frozen_decoder_needs_less(capsys):
    words = ["t5-small", *ZERO2, *SHORT, "--phase", "1", "--freeze_decoder"]
    whole, frozen = (found(capsys, *words, word) for word in ("false", "true"))
    assert whole["trained"] == whole["parameters"]
    assert frozen["trained"] < 0.5 * frozen["parameters"]
    moments = [each["options"][0]["gpu"]["Adam moments"] for each in (whole, frozen)]
    assert moments[1] < 0.5 * moments[0]


def test_only_adapters_and_the_latent_path_have_states(capsys):
    words = ["t5-small", *ZERO2[:3], "true", *SHORT, "--lora_rank", "8"]
    planned = found(capsys, *words)
    # q and v, 8 heads of 64, in 6 + 6 layers; 33 numbers per key and value of a slot in 6
    # layers; mean and log variance of 32 dimensions
    adapters = 12 * 2 * 8 * (512 + 8 * 64)
    trained = adapters + 33 * 6 * 2 * 8 * 64 + (512 + 1) * 64
    # t5-small without cross-attention and its norms
    frozen = 60_506_624 - 6 * (4 * 8 * 64 * 512 + 512)
    assert planned["trained"] == trained
    assert planned["parameters"] == frozen + trained
    assert planned["options"][0]["gpu"] == {
        "weights": 2 * (frozen + trained),
        "float32 weights": 4 * trained,
        "Adam moments": 8 * trained,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["t5-bse"], "did you mean google-t5/t5-base?"),
        (["t5gemma-b-b-ul2"], "use injection cross"),
        (["t5-base", "--gpu", "2"], "did you mean --gpus?"),
        (["t5-base", "--gpu_memory", "much"], "--gpu_memory is 'much'"),
        (["t5-base", "--gpu_memory", "9" * 400], "--gpu_memory is more than 1,000,000 TB"),
        (["t5-base", "--host_memory", "9" * 300 + "TB"], "--host_memory is more than 1,000,000 TB"),
        (["t5-base", "--gpus", "12"], "multiple of --gpus_per_node 8"),
        (["t5-small", "--gpus", "256"], "data.batch_size 128 is less than --gpus 256"),
        (["t5-small", "--gpus", "136", "--batch_size", "135"], "or with --batch_size 136 or more"),
        (["quickstart", "--config", "optimus"], "two configurations"),
        (["t5-base", "--ds_config", "none.json"], "none.json"),
        (["t5-base", "--phase", "3"], "phase is '3', not one of all, 1, 2"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    printed = plan(capsys, *words, code=2)
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert len(printed.err) < 300


def test_sizes():
    assert bytes_of("40GB", "--x") == 40 * 10**9
    assert bytes_of("80GiB", "--x") == 80 * 2**30
    assert bytes_of("1.5mb", "--x") == 1_500_000
    assert bytes_of("123", "--x") == 123
    assert bytes_of("1000000TB", "--x") == 10**18
    for wrong in ("", "GB", "1 PB", "-1GB", "1.2.3GB", "0", "9" * 400, "1000001TB"):
        with pytest.raises(UserError):
            bytes_of(wrong, "--x")


@pytest.mark.parametrize("name", ["zero2 bf16", "zero3 fp32, checkpointing"])
def test_planned_peaks_are_those_of_real_ranks(name, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import plan_memory

    shape = {
        "t5": {"model_type": "t5", "decoder_start_token_id": 0, **plan_memory.SMALL},
        "rows": 4,
        "tokens": 32,
    }
    # Buckets as small as the model: those of a large one would be nearly all that is
    # measured.
    job = {**plan_memory.COMBINATIONS[name], **shape, "zero": {"reduce_bucket_size": 100_000}}
    script = Path(plan_memory.__file__)
    run = train("--rank_of", json.dumps(job), ranks=job["ranks"], script=script)
    measured = json.loads(run.stdout.strip().splitlines()[-1])["live"]
    assert plan_memory.planned(job) == pytest.approx(measured, rel=0.15)
