"""The real command as a user types it: every launcher, what it leaves, and what it says
to mistakes."""

import inspect
import json
import math
import re

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, numbers, rows, start, train
from small_models import make_t5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from dsvae import T5VAE
from dsvae.modeling.families import FAMILIES
from dsvae.modeling.injection import INJECTIONS

NAMES = {
    "rec",
    "kl",
    "elbo",
    "ppl_token",
    "ppl_word",
    "bits_per_byte",
    "mi",
    "mi_cap",
    "marginal_kl",
    "au",
    "kl_per_dim",
    "rec_shuffled",
    "rec_prior",
    "nll_iw",
    "iw_samples",
    "sentences",
    "tokens",
    "words",
    "truncated",
}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A whole run under the deepspeed launcher with two ranks."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run = train(
        "--ds_config",
        CONFIGS / "zero2.json",
        "--config",
        tiny,
        "--output_dir",
        out,
        "--precision",
        "bf16",
        "--eval_every",
        "3",
        "--checkpoint_every",
        "3",
        ranks=2,
        launcher="deepspeed",
    )
    return out, run


def test_what_a_run_leaves(finished):
    out, run = finished
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
        "phase1/model/model.safetensors",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "model/README.md",
    ):
        assert (out / name).exists(), name
    metrics = json.loads((out / "metrics.json").read_text())["test"]
    assert set(metrics) >= NAMES
    assert json.loads((out / "model" / "config.json").read_text())["max_tokens"] == 24
    assert metrics["elbo"] == pytest.approx(-(metrics["rec"] + metrics["kl"]))
    assert metrics["kl"] == pytest.approx(sum(metrics["kl_per_dim"]))
    assert metrics["kl"] == pytest.approx(metrics["mi"] + metrics["marginal_kl"])
    assert metrics["entropy"] == pytest.approx(math.log(3_538_944))  # the built-in corpus
    gap = metrics["rec"] + metrics["kl"] - metrics["entropy"]
    assert metrics["above_entropy"] == pytest.approx(gap)
    for shown in (str(out / "model"), "rec_shuffled", "tensorboard --logdir"):
        assert shown in run.stdout
    assert run.stdout.index("device: CPU (") < run.stdout.index("data: ")
    assert "data: the built-in corpus (600 sentences, seed 0); 2 ranks\n" in run.stdout
    assert "phase 2: 4 steps of 32 sentences, ZeRO 2, bf16" in run.stdout
    assert "zero_optimization" not in run.stdout  # of the resolved ds_config, which is in its file
    assert json.loads((out / "ds_config.phase2.json").read_text())["zero_optimization"]
    checkpoints = {path.parent.name for path in (out / "checkpoints").glob("*/COMPLETE")}
    assert checkpoints == {"phase2-step00000003", "phase2-step00000004"}  # the newest two


def test_the_exported_model_is_usable(finished):
    out, _ = finished
    model, tokenizer = (
        T5VAE.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    batch = tokenizer(["the cat saw a dog"], return_tensors="pt")
    z = model.encode(batch.input_ids, batch.attention_mask).mean
    assert z.shape == (1, 6)
    assert model.generate(latent=z, max_new_tokens=5).shape[1] <= 6
    assert all(w.dtype == torch.float32 for w in model.parameters())


def test_one_step_axis_in_jsonl_and_tensorboard(finished):
    out, _ = finished
    assert [(row["step"], row["phase"]) for row in rows(out)] == [
        (s, 1 if s <= 4 else 2) for s in range(1, 9)
    ]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("main/loss")] == list(range(1, 9))
    logged = [row["loss"] for row in rows(out)]
    assert [e.value for e in events.Scalars("main/loss")] == pytest.approx(logged, rel=1e-6)
    assert [e.step for e in events.Scalars("valid/rec")] == [3, 4, 7, 8]
    assert [e.step for e in events.Images("valid/kl_per_dim")] == [3, 4, 7, 8]
    for row in rows(out):
        assert row["tokens_per_s"] > 0
        assert row["flops_per_s"] > 0
        # torch alone takes a tenth of a gigabyte
        assert 0.1 < row["peak_memory_gb"] < 100
    assert {"reconstruction/text_summary", "prior/text_summary"} <= set(events.Tags()["tensors"])
    assert any("_hparams_" in name for name in events.PluginTagToContent("hparams"))


def test_beta_is_logged_as_it_was_used(finished):
    out, _ = finished
    assert [row["beta"] for row in rows(out)] == [0, 0, 0, 0, 0.0, 0.5, 1.0, 1.0]
    for row in rows(out):
        threshold = sum(max(0.2, kl) for kl in row["kl_per_dim"])
        assert row["loss"] == pytest.approx(row["rec"] + row["beta"] * threshold, rel=1e-6)


def test_the_written_config_repeats_the_run(finished, tmp_path):
    out, _ = finished
    train(
        "--config",
        out / "config.yaml",
        "--output_dir",
        tmp_path / "again",
        ranks=2,
    )
    assert numbers(tmp_path / "again") == numbers(out)


ONE_RANK = ("--ds_config", CONFIGS / "zero1.json", "--config")


def run_of_one_rank(launcher, tiny, out):
    """A whole run, and its directory."""
    run = train(*ONE_RANK, tiny, "--output_dir", out, "--verbose", launcher=launcher)
    return out, run


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    return run_of_one_rank("python", tiny, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_other_launchers(launcher, alone, tiny, tmp_path):
    made = alone if launcher == "python" else run_of_one_rank(launcher, tiny, tmp_path / "run")
    out, run = made
    assert '"zero_optimization": {' in run.stdout
    assert (out / "metrics.json").exists()


def test_phase_1_then_phase_2_is_both(alone, tiny, tmp_path):
    apart = (*ONE_RANK, tiny, "--output_dir", tmp_path / "apart")
    train(*apart, "--phase", "1")
    assert not (tmp_path / "apart" / "model").exists()
    train(*apart, "--phase", "2")
    assert numbers(tmp_path / "apart") == numbers(alone[0])


def test_a_pretrained_t5_directory(tmp_path, cache_dir):
    """The real loading code, on a v1.1 T5 with a tokenizer beside it."""
    from small_models import small_tokenizer

    source = make_t5("t5 v1.1", tmp_path)
    small_tokenizer(["a dog sees the cat", "the cats see dogs"], 60).save_pretrained(source)
    (tmp_path / "train.txt").write_text("\n".join(f"the cat sees {i} dogs" for i in range(60)))
    train(
        "--ds_config",
        CONFIGS / "zero2.json",
        "--config",
        "park2021",
        "--model",
        source,
        "--train_file",
        tmp_path / "train.txt",
        "--phase1.steps",
        "2",
        "--phase2.steps",
        "2",
        "--data.batch_size",
        "8",
        "--output_dir",
        tmp_path / "run",
        "--data.cache_dir",
        cache_dir,
        ranks=2,
    )
    model = T5VAE.from_pretrained(tmp_path / "run" / "model")
    assert not model.config.tie_word_embeddings
    assert model.config.pooling == "max"


# Mistakes: one line, exit code 2, nothing half-written


def mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("eins\nzwei\nMüßiggang\n".encode("latin-1"))
    (tmp_path / "a.csv").write_text("sentence,label\nhello there,1\n")
    (tmp_path / "three.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "noweights").mkdir()
    make_t5("t5 v1.0", tmp_path / "noweights")
    (tmp_path / "noweights" / "model.safetensors").unlink()
    (tmp_path / "bad.json").write_text('{"zero_optimisation": {"stage": 2}}')
    (tmp_path / "auto.json").write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}'
    )
    ds = ("--ds_config", CONFIGS / "zero2.json")
    return {
        "unknown flag": ((*ds, "--phase2.free_bit", "1"), "phase2.free_bits"),
        "no ds_config": ((), "--ds_config"),
        "missing ds_config": (("--ds_config", "nowhere.json"), "nowhere.json"),
        "unknown ds_config key": (("--ds_config", tmp_path / "bad.json"), "zero_optimization"),
        "auto unresolved": (
            ("--ds_config", tmp_path / "auto.json"),
            "zero_optimization.reduce_bucket_size",
        ),
        "missing file": ((*ds, "--train_file", "nowhere.txt"), "nowhere.txt"),
        "empty file": ((*ds, "--train_file", tmp_path / "empty.txt"), "empty.txt"),
        "not UTF-8": ((*ds, "--train_file", tmp_path / "latin.txt"), "latin.txt:3"),
        "unknown column": ((*ds, "--train_file", tmp_path / "a.csv"), "sentence"),
        "model without weights": (
            (*ds, "--model", tmp_path / "noweights", "--phase", "2"),
            "noweights",
        ),
        "output not writable": ((*ds, "--output_dir", tmp_path / "file" / "run"), "output_dir"),
        "more ranks than sentences": ((*ds, "--train_file", tmp_path / "three.txt"), "2 ranks"),
        "fp16 on CPU": (("--ds_config", CONFIGS / "fp16.json"), "fp16"),
        "compiled at ZeRO 3": (
            ("--ds_config", CONFIGS / "zero3.json", "--compile"),
            "hooks fetch the weights",
        ),
        "resume from nothing": ((*ds, "--resume", tmp_path / "nothing"), "nothing"),
    }


def test_mistakes(tmp_path, cache_dir):
    """One line on stderr, from rank 0 alone, and exit code 2 from every rank, whoever
    finds the mistake."""
    cases = mistakes(tmp_path)
    if torch.cuda.is_available():
        del cases["fp16 on CPU"]
    for name, (arguments, word) in cases.items():
        out = ("--output_dir", tmp_path / "out") if "--output_dir" not in arguments else ()
        ranks = (
            2
            if name
            in (
                "more ranks than sentences",
                "not UTF-8",
                "model without weights",
                "auto unresolved",
            )
            else 1
        )
        run = start(
            *arguments,
            *out,
            "--data.cache_dir",
            cache_dir,
            "--data.builtin_size",
            "600",
            ranks=ranks,
        )
        assert run.wait(300) == 2, f"{name}: {run.stderr[-3000:]}"
        assert [p.returncode for p in run.processes] == [2] * ranks, name
        lines = [line for line in run.stderr.splitlines() if line.startswith("dsvae: error:")]
        assert len(lines) == 1, f"{name}: {run.stderr[-3000:]}"
        assert word in lines[0], f"{name}: {lines[0]}"
        assert "Traceback" not in run.stderr, name
        assert not (tmp_path / "out" / "model").exists(), name


def test_the_deepspeed_launcher_passes_exit_code_2_on(tiny, tmp_path):
    run = train(
        "--config", tiny, "--ds_config", "nowhere.json", launcher="deepspeed", ranks=2, code=2
    )
    assert "dsvae: error: --ds_config nowhere.json" in run.stderr + run.stdout


def test_a_live_output_dir_is_refused(tiny, tmp_path):
    common = (
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / "zero1.json",
        "--output_dir",
        tmp_path / "run",
    )
    first = start(*common, "--phase1.steps", "1000000")
    try:
        first.wait_for(tmp_path / "run" / "metrics.jsonl")
        refused = train(*common, "--phase1.steps", "1000000", code=2)
        assert "still alive" in refused.stderr
    finally:
        first.kill()


def test_a_full_config_shows_no_unread_field():
    """Every field of the configuration is read somewhere outside config.py."""
    from dsvae.config import field_types

    code = "\n".join(p.read_text() for p in (ROOT / "dsvae").rglob("*.py") if p.name != "config.py")
    # What only one family or injection reads is an argument of it.
    kinds = (*FAMILIES.values(), *INJECTIONS.values())
    arguments = {name for kind in kinds for name in inspect.signature(kind).parameters}
    unread = [
        name
        for name in field_types()
        if name.rsplit(".", 1)[-1] not in arguments
        and f".{name.rsplit('.', 1)[-1]}" not in code
        and f'"{name.rsplit(".", 1)[-1]}"' not in code
    ]
    assert unread == []


def test_recipes_are_yaml_with_a_comment():
    from dsvae.config import RECIPES

    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().startswith("#"), path
        assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("config", ["zero0", "zero2"])
def test_the_kl_ahead_of_a_step_is_that_of_the_passes_that_train(config, tiny, tmp_path):
    """Free bits decide by it. bf16, at ZeRO 0 by autocast, with dropout: the same masks
    and the same rounding."""
    run = train(
        "--config",
        tiny,
        "--ds_config",
        CONFIGS / f"{config}.json",
        "--output_dir",
        tmp_path / "run",
        "--phase",
        "2",
        "--precision",
        "bf16",
        "--model.dropout",
        "0.1",
        "--data.micro_batch_tokens",
        "100",
        ranks=2,
        script=ROOT / "tests/distributed/kl_ahead_train.py",
    )
    found = re.findall(r"rank \d: (\d+) micro-batches, largest difference (\S+)", run.stdout)
    assert len(found) >= 6
    assert min(int(count) for count, _ in found) > 1
    assert max(float(error) for _, error in found) == 0
