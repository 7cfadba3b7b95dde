"""A T5 with pretrained weights (shared/models/t5-mini, where it is there): loaded with
every injection, trained on two ranks at ZeRO 3, resumed, exported and packaged."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, environment, numbers, rows, train
from safetensors.torch import load_file
from small_models import plain_nats
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from without_dsvae import outputs

from dsvae import T5VAE, hub, pretrained
from dsvae.data.grammar import draw
from dsvae.data.tokenization import load_tokenizer
from dsvae.export import export_checkpoint

MINI = Path(__file__).parents[3] / "shared" / "models" / "t5-mini"
pytestmark = pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/models/t5-mini")

ALONE = ROOT / "tests" / "distributed" / "train_alone.py"
CONFIG = {
    "data": {"builtin_size": 300, "batch_size": 8, "max_tokens": 24},
    "model": {
        **{"name": str(MINI), "dropout": 0.0, "latent_dim": 6},
        **{"pooling": "max", "injection": "both"},
    },
    "phase": "2",
    "phase2": {"steps": 2, "lr": 1e-3, "deletion": 0.2, "beta": {"kind": "constant"}},
    "eval": {"shown": 1, "iw_samples": 0, "sentences": 8},
    "precision": "fp32",
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
}


@pytest.fixture(scope="module")
def t5():
    return T5ForConditionalGeneration.from_pretrained(MINI, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch():
    """ids, mask and labels of a few sentences."""
    texts = [sentence.text for sentence in draw(4, 0)]
    given = load_tokenizer(str(MINI))(texts, return_tensors="pt", padding=True)
    ids, mask = given.input_ids, given.attention_mask
    return ids, mask, ids.masked_fill(mask == 0, -100)


def of_transformers(t5, states, labels):
    """-log p of each sentence by transformers' T5, whose cross-attention reads `states`.
    It has no biases, so states of zeros are no states at all."""
    out = t5(encoder_outputs=BaseModelOutput(states), labels=labels)
    return plain_nats(out.logits, labels)


@pytest.mark.parametrize("injection", ["memory", "embedding", "both", "cross", "none"])
@torch.no_grad()
def test_every_injection_has_the_pretrained_weights(t5, batch, injection):
    ids, mask, labels = batch
    model = T5VAE.from_t5(MINI, injection=injection, latent_dim=6).eval()
    original = t5.state_dict()
    assert torch.equal(model.shared.weight, original["shared.weight"])
    assert torch.equal(model.lm_head.weight, original["lm_head.weight"])
    for name, weight in model.decoder.state_dict().items():
        if "SelfAttention" in name or "EncDecAttention" in name:
            assert torch.equal(weight, original[f"decoder.{name}"]), name
    if injection != "none":
        states = model._encode(ids, mask).last_hidden_state
        expected = t5.encoder(ids, mask).last_hidden_state
        torch.testing.assert_close(states[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
    z = torch.randn(len(ids), model.family.latent_width)
    found = model(latent=z, labels=labels).nats
    nothing = torch.zeros(len(ids), 1, t5.config.d_model)
    without = of_transformers(t5, nothing, labels)
    if injection == "none":
        torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-4)
    elif injection == "cross":
        vectors = model.injection(z, t5.shared(ids))[1]["encoder_hidden_states"]
        expected = of_transformers(t5, vectors, labels)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    else:
        assert (found - without).abs().min() > 1e-3  # the decoder reads z
    if injection == "embedding":
        for weight in model.injection.parameters():
            weight.zero_()
        torch.testing.assert_close(
            model(latent=z, labels=labels).nats, without, rtol=1e-5, atol=1e-4
        )


@pytest.fixture(scope="module")
def command(cache_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("mini") / "config.yaml"
    data = {**CONFIG["data"], "cache_dir": str(cache_dir)}
    path.write_text(yaml.safe_dump({**CONFIG, "data": data}))
    return ("--config", path, "--ds_config")


@pytest.fixture(scope="module")
def sharded(command, tmp_path_factory):
    """A finished run of two ranks at ZeRO 3."""
    directory = tmp_path_factory.mktemp("zero3") / "run"
    train(*command, CONFIGS / "zero3.json", "--output_dir", directory, ranks=2)
    return directory


def test_two_ranks_at_zero_3_have_the_losses_of_one(sharded, command, tmp_path):
    train(*command, CONFIGS / "zero1.json", "--output_dir", tmp_path / "one", script=ALONE)
    found, expected = rows(sharded), rows(tmp_path / "one")
    assert [row["step"] for row in found] == [1, 2]
    for name in ("loss", "rec", "kl"):
        values = [[row[name] for row in each] for each in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name


def test_a_resumed_run_has_the_losses_of_an_uncut_one(sharded, command, tmp_path):
    cut = shutil.copytree(sharded, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "phase2-step00000002")
    shutil.rmtree(cut / "model")
    (cut / "metrics.json").unlink()
    train(*command, CONFIGS / "zero3.json", "--output_dir", cut, ranks=2)
    assert numbers(cut) == numbers(sharded)
    found, expected = (load_file(each / "model" / "model.safetensors") for each in (cut, sharded))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_export_and_package(sharded, tmp_path):
    exported = export_checkpoint(sharded, "latest", tmp_path / "exported", pytest.fail)
    found, expected = (
        load_file(each / "model.safetensors") for each in (exported, sharded / "model")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    wanted = outputs(*pretrained.load(exported))
    packaged = str(hub.package(str(exported), tmp_path / "packaged"))
    subprocess.run(
        [sys.executable, ROOT / "tests" / "without_dsvae.py", tmp_path / "out", packaged],
        check=True,
        timeout=400,
        cwd=tmp_path,
        env=environment(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1"),
    )
    out = load_file(tmp_path / "out")
    for key, value in wanted.items():
        torch.testing.assert_close(out[f"{packaged} {key}"], value, rtol=0, atol=0)
