"""A finished model in the precision that was asked for."""

import json

import pytest
import torch
from small_models import make_vae, small_tokenizer
from torch.nn import functional as F

from dsvae import cli, pretrained
from dsvae.errors import UserError

TEXTS = ["a bad bee", "the cab had a bed", "he had the beach ball cab bad bed"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_vae("t5 v1.1").save_pretrained(path)
    small_tokenizer(TEXTS).save_pretrained(path)
    (path / "texts.txt").write_text("\n".join(TEXTS))
    return path


def test_bf16_has_float32_heads_and_the_likelihood_of_bf16_products(directory):
    model, tokenizer = pretrained.load(directory, precision="bf16")
    assert pretrained.precision_of(model) == "bf16"
    for name, parameter in model.named_parameters():
        is_head = name.startswith("posterior.")
        assert parameter.dtype == (torch.float32 if is_head else torch.bfloat16), name
    metrics = {}
    for precision in ("fp32", "bf16"):
        output = directory / precision
        cli.evaluate(
            str(directory),
            test_file=str(directory / "texts.txt"),
            output=str(output),
            precision=precision,
        )
        metrics[precision] = json.loads((output / "metrics.json").read_text())["test"]
        assert metrics[precision]["precision"] == precision
    # q(z|x) of the model in bf16 by hand, sentence by sentence
    kl = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        states = model.encoder(inputs_embeds=F.embedding(ids, model.shared.weight))[0]
        mean, logvar = model.posterior.head(states.float().mean(1)).chunk(2, -1)
        kl.append(0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum().item())
    assert metrics["bf16"]["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-2)
    assert metrics["bf16"]["kl"] != metrics["fp32"]["kl"]
    assert metrics["bf16"]["rec"] == pytest.approx(metrics["fp32"]["rec"], rel=0.02)


def test_tf32_needs_a_gpu(directory):
    with pytest.raises(UserError, match="tf32 needs an NVIDIA GPU"):
        pretrained.load(directory, precision="tf32")


def test_generation_in_bf16(directory, capsys):
    cli.sample(str(directory), n=2, seed=0, precision="bf16", max_new_tokens=5)
    assert len(capsys.readouterr().out.splitlines()) == 2
