"""Weights one tensor at a time: read from safetensors alone, or drawn as transformers
draws them."""

import json
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import T5_CONFIGS, make_t5, make_vae
from transformers import AutoModelForSeq2SeqLM

from dsvae import T5VAE, T5VAEConfig
from dsvae.errors import UserError
from dsvae.modeling.weight_source import Origin
from dsvae.pretrained import load


def fresh(kind, seed, **latent):
    config = {"latent_dim": 16, "injection": "both", "pooling": "attention", **latent}
    return Origin(lambda: T5VAE(T5VAEConfig(t5=T5_CONFIGS[kind](), **config)), seed)


def test_drawn_weights_have_the_distribution_of_transformers_own(kind):
    """Pooled over many seeds: mean and deviation of every parameter are those of a
    model that transformers initialized."""
    count = 30
    ours, theirs = {}, {}
    for seed in range(count):
        torch.manual_seed(10_000 + seed)
        model = T5VAE(
            T5VAEConfig(t5=T5_CONFIGS[kind](), latent_dim=16, injection="both", pooling="attention")
        )
        origin = fresh(kind, seed)
        for name, weight in model.named_parameters():
            theirs.setdefault(name, []).append(weight.detach())
            ours.setdefault(name, []).append(origin.tensor(name))
    for name, draws in theirs.items():
        expected, found = torch.stack(draws), torch.stack(ours[name])
        spread = expected.std()
        if spread < 1e-6:
            assert torch.equal(found, expected), name  # norms and biases: constants
            continue
        error = 6 / found.numel() ** 0.5
        assert found.std() / spread == pytest.approx(1, abs=error), name
        assert abs(found.mean()) < error * spread, name
        assert found.std(0).min() > 0, name  # no seed and no element stands still


def test_drawn_weights_depend_on_seed_and_name_alone(kind):
    model = fresh(kind, 3).build()
    names = [name for name, _ in model.named_parameters()]
    state = torch.get_rng_state()
    again = fresh(kind, 3)
    for name in reversed(names):  # another order, and some twice
        assert torch.equal(again.tensor(name), model.get_parameter(name)), name
    assert torch.equal(again.tensor(names[0]), model.get_parameter(names[0]))
    assert torch.equal(torch.get_rng_state(), state)
    other = fresh(kind, 4)
    matrices = [name for name in names if model.get_parameter(name).ndim > 1]
    assert not any(torch.equal(other.tensor(name), model.get_parameter(name)) for name in matrices)
    values = [model.get_parameter(name).flatten()[:8] for name in matrices]
    # nor do two names share a draw
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_every_weight_of_a_sharded_t5_is_that_of_transformers(kind, tmp_path):
    make_t5(kind, tmp_path / "whole")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "model.safetensors").unlink()
    index = {}
    for i, name in enumerate(sorted(state)):
        index[name] = f"part-{i % 3}.safetensors"
    for file in set(index.values()):
        save_file(
            {n: state[n] for n in index if index[n] == file},
            tmp_path / "whole" / file,
            metadata={"format": "pt"},
        )
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    model = T5VAE.from_t5(str(tmp_path / "whole"), latent_dim=6)
    assert (model.lm_head.weight is model.shared.weight) == (kind == "t5 v1.0")
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not name.startswith(("posterior.", "injection.")):
            in_t5 = (
                name.replace(".layer.1.", ".layer.2.") if name.startswith("decoder.block") else name
            )
            assert torch.equal(weight, expected[in_t5]), name


@pytest.mark.parametrize(
    "names",
    [["encoder.embed_tokens.weight"], ["lm_head.weight"], ["shared.weight", "lm_head.weight"]],
)
def test_a_tied_embedding_may_have_another_name_or_lie_there_twice(names, tmp_path):
    make_t5("t5 v1.0", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state.pop("shared.weight")
    state |= {name: embedding.clone() for name in names}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = T5VAE.from_t5(str(tmp_path), latent_dim=6)
    assert model.lm_head.weight is model.shared.weight
    assert torch.equal(model.shared.weight, embedding)


def test_a_saved_model_is_read_back_bit_by_bit(kind, tmp_path):
    model = make_vae(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = T5VAE.origin_in(str(tmp_path)).build()
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters())


def test_missing_or_misshapen_weights_are_errors(tmp_path):
    make_vae().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for broken, word in (
        (
            {n: w for n, w in state.items() if n != "posterior.head.bias"},
            "lacks weights: posterior.head.bias",
        ),
        (
            {**state, "posterior.head.bias": torch.zeros(5)},
            r"posterior.head.bias has the shape \(5,\)",
        ),
    ):
        save_file(broken, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=word):
            T5VAE.origin_in(str(tmp_path))


def test_a_file_that_changes_is_noticed(tmp_path):
    make_vae().save_pretrained(tmp_path)
    origin = T5VAE.origin_in(str(tmp_path))
    origin.check_unchanged()
    make_vae(seed=1).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has changed"):
        origin.check_unchanged()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no longer exists"):
        origin.check_unchanged()


class Malicious:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_refused_and_not_run(name, tmp_path):
    """Under its own name and under that of a safetensors file, by every way in."""
    for kind, directory in (("t5", tmp_path / "t5"), ("vae", tmp_path / "vae")):
        directory.mkdir()
        if kind == "t5":
            make_t5("t5 v1.0", directory)
        else:
            make_vae().save_pretrained(directory)
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    for attempt in (
        lambda: T5VAE.from_t5(str(tmp_path / "t5")),
        lambda: T5VAE.from_pretrained(tmp_path / "vae"),
        lambda: T5VAE.origin_in(str(tmp_path / "vae")),
        lambda: load(tmp_path / "vae"),
    ):
        with pytest.raises((OSError, SafetensorError, UserError)) as caught:
            attempt()
        if name.endswith(".bin"):
            assert "pickles" in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load(tmp_path / "vae")
    with pytest.raises(ValueError, match="safetensors only"):
        T5VAE.from_pretrained(tmp_path / "vae", use_safetensors=False)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "vae" / name).read_bytes())
    assert (tmp_path / "executed").exists()  # the pickle is one that would have done it
