"""Invariant 6: a frozen decoder stays bit-identical, costs no optimizer state, and the
injection trains all the same."""

import json
import shutil

import pytest
import torch
import yaml
from launch import CONFIGS, TINY, train
from safetensors.torch import load_file
from small_models import INJECTIONS, make_vae, small_tokenizer

from dsvae.config import DataConfig
from dsvae.data.corpora import load_corpus
from dsvae.data.sources import source_of


@pytest.mark.parametrize(
    ("stage", "injection"),
    [(1, "both"), (2, "both"), *((3, injection) for injection in INJECTIONS)],
)
def test_phase_1_with_a_frozen_decoder(stage, injection, cache_dir, tmp_path):
    run = tmp_path / "run"
    config = frozen_phase_1(tmp_path, cache_dir, injection)
    train(
        "--config",
        config,
        "--ds_config",
        CONFIGS / f"zero{stage}.json",
        "--output_dir",
        run,
        ranks=2,
    )

    before = load_file(tmp_path / "start" / "model.safetensors")
    after = load_file(run / "phase1" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    frozen = {n for n in before if n.startswith(("decoder.", "shared.", "lm_head."))}
    assert frozen
    for name in before:
        if name in frozen:
            assert torch.equal(before[name], after[name]), f"{name} is frozen and moved"
        else:
            assert not torch.equal(before[name], after[name]), (
                f"{name} should train and did not move"
            )

    trained = sum(w.numel() for name, w in before.items() if name not in frozen)
    states = sum(
        _numbers_of(torch.load(path, map_location="cpu", weights_only=False), "exp_avg")
        for path in (run / "checkpoints" / "phase1-step00000003").glob("*optim_states.pt")
    )
    assert trained <= states < 1.05 * trained + 4096  # partitions are padded to equal parts


def frozen_phase_1(directory, cache_dir, injection="both"):
    """A configuration of phase 1 from a model in `directory` / start; its file."""
    texts = load_corpus(source_of(DataConfig(builtin_size=300)), 0, directory).splits["train"][
        "text"
    ]
    tokenizer = small_tokenizer(texts, 60)
    model = make_vae("t5 v1.1", injection=injection)
    # Weights that bfloat16 cannot hold: a copy that went through the engine's cast
    # would show.
    assert any((w != w.bfloat16().float()).any() for w in model.parameters())
    model.save_pretrained(directory / "start")
    tokenizer.save_pretrained(directory / "start")
    config = {
        **TINY,
        "data": {**TINY["data"], "cache_dir": str(cache_dir)},
        "model": {
            "name": str(directory / "start"),
            "latent_dim": 6,
            "memory_slots": 2,
            "injection": injection,
        },
        "phase1": {"steps": 3, "lr": 1e-3, "freeze_decoder": True},
        "phase": "1",
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory / "config.yaml"


@pytest.mark.parametrize(("stage", "other"), [(2, 0), (3, 2)])
def test_a_model_that_changes_while_the_run_is_cut_is_refused(stage, other, cache_dir, tmp_path):
    """On resume at once, at another stage too; with a checkpoint that has no digest of
    it, by the export."""
    run, file = tmp_path / "run", tmp_path / "start" / "model.safetensors"
    common = ("--config", frozen_phase_1(tmp_path, cache_dir))
    stages = {each: ("--ds_config", CONFIGS / f"zero{each}.json") for each in (stage, other)}
    train(*common, *stages[stage], "--output_dir", tmp_path / "uncut", ranks=2)
    shutil.copytree(tmp_path / "uncut", run)
    shutil.rmtree(run / "phase1")  # a run that was cut before its export
    shutil.copy(file, tmp_path / "original")
    make_vae("t5 v1.1", seed=1, injection="both").save_pretrained(tmp_path / "start")

    def refused(*arguments):
        cut = train(*arguments, "--output_dir", run, ranks=2, code=2)
        assert cut.codes == [2, 2]
        (line,) = [line for line in cut.stderr.splitlines() if line.startswith("dsvae: error:")]
        assert "the model has changed since the run began; put it back" in line
        assert not list((run / "phase1").glob("*"))  # not what an export begins, either
        assert not list((run / "phase1").glob(".*"))
        return line

    for each in (stage, other):
        assert "phase1-step00000003" in refused(*common, *stages[each])
    path = run / "checkpoints" / "phase1-step00000003" / "COMPLETE"
    complete = json.loads(path.read_text())
    assert len(complete["meta"].pop("frozen")) == 64
    path.write_text(json.dumps(complete))
    assert refused(*common, *stages[stage]).startswith("dsvae: error: shared.weight is frozen")

    shutil.copy(tmp_path / "original", file)
    train(*common, *stages[stage], "--output_dir", run, ranks=2)
    found, expected = (
        load_file(d / "phase1" / "model" / "model.safetensors") for d in (run, tmp_path / "uncut")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _numbers_of(tree, key):
    """Elements of all tensors under `key`, anywhere in a checkpoint."""
    if isinstance(tree, dict):
        return sum(
            v.numel() if k == key and torch.is_tensor(v) else _numbers_of(v, key)
            for k, v in tree.items()
        )
    if isinstance(tree, (list, tuple)):
        return sum(_numbers_of(v, key) for v in tree)
    return 0
