"""Adapters against the plain model of the matrices W + (alpha / r) B A."""

import copy

import pytest
import torch
from small_models import make_t5, make_vae, small_tokenizer

from dsvae import T5VAE
from dsvae.config import LoraConfig, ModelConfig
from dsvae.engine.build import find_origin
from dsvae.engine.weights import freeze_decoder, freeze_pretrained
from dsvae.errors import UserError
from dsvae.modeling.lora import merged

RANK, ALPHA = 3, 1.5
ALL = {"rank": RANK, "alpha": ALPHA, "targets": ["q", "k", "v", "o", "wi", "wo"]}
KINDS = ("t5 v1.0", "t5 v1.1", "umt5")


def batch(conditional):
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 2 + [0] * 5])
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    given["noise"] = torch.randn(3, 6)
    if conditional:
        given |= {"condition_ids": ids[:, :4], "condition_mask": mask[:, :4]}
    return given


def by_hand(model):
    """The weights without adapters, each element of the product as its own sum."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    plain = {name: w for name, w in state.items() if "lora" not in name}
    for name, a in state.items():
        if name.endswith(".lora_a"):
            owner = name.removesuffix(".lora_a")
            change = torch.einsum("or,ri->oi", state[f"{owner}.lora_b"].double(), a.double())
            plain[f"{owner}.weight"] = (plain[f"{owner}.weight"] + ALPHA / RANK * change).float()
    return plain


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "t5gemma"])
def test_the_model_is_that_of_the_changed_matrices(kind, conditional, tmp_path):
    model = make_vae(kind, conditional=conditional, lora=ALL)  # every weight is drawn, B too
    plain = make_vae(kind, conditional=conditional)
    weights = by_hand(model)
    adapted = {n.rpartition(".")[0] for n, _ in model.named_parameters() if "lora_a" in n}
    linear = {n.removesuffix(".weight") for n in weights if n.startswith(("encoder.", "decoder."))}
    bare = ("norm", "relative_attention_bias")
    assert adapted == {name for name in linear if not name.endswith(bare)}

    found = dict(merged(((n, p.detach()) for n, p in model.named_parameters()), model.config.lora))
    assert list(found) == [name for name, _ in plain.named_parameters()]
    for name, weight in found.items():
        torch.testing.assert_close(weight, weights[name])
        plain.get_parameter(name).data.copy_(weight)
    given = batch(conditional)
    expected, out = plain(**given), model(**given)
    torch.testing.assert_close(out.logits, expected.logits, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(out.latent, expected.latent, rtol=2e-4, atol=2e-4)

    model.save_pretrained(tmp_path)
    again = T5VAE.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, out.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing(kind, tmp_path):
    make_t5(kind, tmp_path)
    adapted, plain = (
        T5VAE.origin_in_t5(str(tmp_path), seed=5, latent_dim=6, lora=lora).build().eval()
        for lora in (ALL, None)
    )
    for name, weight in plain.named_parameters():  # drawn ones too
        assert torch.equal(adapted.get_parameter(name), weight), name
    given = batch(False)
    assert torch.equal(adapted(**given).logits, plain(**given).logits)
    a = [p for n, p in adapted.named_parameters() if n.endswith("lora_a")]
    values = torch.cat([(p * p.shape[1] ** 0.5).flatten() for p in a])
    assert values.mean().abs() < 0.1
    assert abs(values.std() - 1) < 0.1
    assert len({p[0, 0].item() for p in a}) == len(a)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_adapters_and_the_latent_path_have_gradients(frozen):
    lora = ALL | {"targets": ["wi", "q"]}
    model = make_vae("t5 v1.1", injection="both", lora=lora)
    freeze_pretrained(model)
    if frozen:
        freeze_decoder(model)
    before = copy.deepcopy(model.state_dict())
    out = model(**batch(False))
    (out.logits.logsumexp(-1).sum() + out.posterior.parameters.square().sum()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if n.startswith(("posterior.", "injection."))}
    for stack, layers in (("encoder", 2), *([("decoder", 3)] if not frozen else [])):
        for i in range(layers):
            for part in ("0.SelfAttention.q", "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"):
                names = (f"{stack}.block.{i}.layer.{part}.lora_{x}" for x in "ab")
                expected |= set(names)
    assert moved == expected


def test_a_trained_model_gets_adapters_or_keeps_its_own(tmp_path):
    """A run that starts from a T5VAE."""

    def origin(directory, **lora):
        settings = ModelConfig(
            name=str(directory), latent_dim=6, memory_slots=2, lora=LoraConfig(**lora)
        )
        return find_origin(settings, small_tokenizer(["a b"]), None, 3)

    model = make_vae()
    model.save_pretrained(tmp_path / "plain")
    added = origin(tmp_path / "plain", rank=2).build()
    assert {n for n, _ in added.named_parameters()} > {n for n, _ in model.named_parameters()}
    assert torch.equal(added.eval()(**batch(False)).logits, model(**batch(False)).logits)

    model = make_vae(lora={"rank": 2, "alpha": 16.0, "targets": ["q", "v"]})
    model.save_pretrained(tmp_path / "adapted")
    kept = origin(tmp_path / "adapted", rank=2, targets=["v", "q"]).build()
    assert all(torch.equal(kept.get_parameter(n), p) for n, p in model.named_parameters())
    for other in ({}, {"rank": 4}):
        with pytest.raises(UserError, match=r"its lora is \{'rank': 2,.*set --model\.lora"):
            origin(tmp_path / "adapted", **other)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"targets": []}, {"targets": ["x"]}])
def test_wrong_settings_of_a_config_json_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^lora\.\w+ "):
        make_vae(lora=ALL | wrong)
