"""Invariant 4: one gradient, whatever the split. The real command against a bare loop
of plain torch."""

import json
import math

import pytest
import torch
import yaml
from launch import CONFIGS, ROOT, TINY, rows, train
from safetensors.torch import load_file
from torch.distributions import Beta, Normal, kl_divergence
from torch.nn import functional as F

from dsvae import T5VAE, T5VAEConfig
from dsvae.config import DataConfig
from dsvae.data.batches import TrainingBatches
from dsvae.data.prepared import load_prepared, prepare
from dsvae.export import export_checkpoint
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import evaluate

STEPS = 6


@pytest.fixture(scope="module")
def prepared(cache_dir):
    data = DataConfig(**TINY["data"], cache_dir=str(cache_dir))
    return load_prepared(
        prepare(data, tokenizer=None, vocab_size=TINY["model"]["vocab_size"], seed=0)
    )


SYSTEMS = {
    "memory": {},
    "embedding": {"injection": "embedding"},
    "both": {"injection": "both"},
    "cross": {"injection": "cross"},
    "spike_slab": {"family": "spike_slab"},
    "categorical": {"family": "categorical", "categories": 3},
    "lora": {"lora": {"rank": 3, "alpha": 6.0, "targets": ["o", "q", "wi", "wo"]}},
    "scaled": {},
    "chunks": {"injection": "cross", "latent_vectors": 12, "pooling": "chunks", "chunk": 2},
    "queries": {"latent_vectors": 3, "pooling": "queries", "query_layers": 2},
    "disturbed": {"normalize": "l2"},
    "disturbed chunks": {
        "injection": "cross",
        "latent_vectors": 12,
        "pooling": "chunks",
        "chunk": 2,
    },
}
"""The latent path of each system."""
DRAWS = {"spike_slab": 3}
TOTAL_CORRELATION = {"categorical": 2.0}
FREE_BITS = {"categorical": 0.065, "spike_slab": 1.7}
LENGTH_WEIGHTED = ("embedding",)
SCALED = ("scaled",)
"""The systems whose learning rate is scaled by the RMS of each tensor."""
DISTURBED = ("disturbed", "disturbed chunks")
"""The systems with noise on z, dropout of z and a z that is aligned with the first
encoder."""
LATENT_NOISE, LATENT_DROPOUT, ALIGN = 0.7, 0.2, 3.0
RELEASED = {"spike_slab": 2}
"""The last steps, whose free bits are off."""


def start_model(system, prepared, directory):
    torch.manual_seed(11)
    t5 = {
        **TINY["model"]["t5"],
        "vocab_size": len(prepared.tokenizer),
        "feed_forward_proj": "gated-gelu",
    }
    model = T5VAE(
        T5VAEConfig(
            t5={**t5, "decoder_start_token_id": 0},
            latent_dim=6,
            memory_slots=2,
            align=system in DISTURBED,
            **SYSTEMS[system],
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_b"):  # adapters that have trained before
                weight.normal_(0.0, 0.1)
            if system in SCALED and (rms := rms_of(weight)):
                # a power of four, so that a group of like tensors has the RMS of each
                weight.mul_(4.0 ** round(math.log(rms, 4)) / rms)
    model.save_pretrained(directory)
    prepared.tokenizer.save_pretrained(directory)
    return directory


def rms_of(weight):
    return weight.pow(2).mean().sqrt().item()


def kl_by_hand(model, parameters, tokens):
    """KL of every sentence and unit from the head's output, by torch.distributions.

    Args:
        tokens: (B,), that the encoder read of each sentence. A chunk of two without any
            counts as 0.
    """
    if (vectors := model.config.latent_vectors) > 1:
        heads = parameters[:, : vectors * 12].unflatten(1, (vectors, 12))
        mean, logvar = heads.chunk(2, dim=-1)
        kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
        if model.config.pooling == "chunks":
            kl = kl * (2 * torch.arange(vectors) < tokens[:, None])[..., None]
        return kl.flatten(1)
    if model.config.family == "categorical":
        log_q = parameters.view(-1, 6, 3).log_softmax(-1)
        return (log_q.exp() * (log_q + math.log(3))).sum(-1)
    mean, logvar, *raw = parameters.split(6, dim=-1)
    gaussian = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    if model.config.family == "gaussian":
        return gaussian
    a, b = (0.5 + F.softplus(each) for each in raw)
    return b / (a + b) * gaussian + kl_divergence(Beta(a, b), Beta(4.0, 1.0))


def information_by_hand(parameters):
    """The sum of the mutual information of every pair of variables."""
    p = parameters.view(-1, 6, 3).softmax(-1)
    joint = torch.einsum("ndj,nek->dejk", p, p) / len(p)
    alone = p.mean(0)
    ratio = joint / torch.einsum("dj,ek->dejk", alone, alone)
    return (joint * ratio.log()).sum((2, 3)).triu(1).sum()


def best_noise(model, batch, draws):
    """Of several draws the one under which each sentence is likeliest, by as many
    separate passes."""
    rec = []
    for draw in range(draws):
        out = model(
            batch.input_ids, batch.attention_mask, labels=batch.labels, noise=batch.noise[:, draw]
        )
        nats = F.cross_entropy(out.logits.transpose(1, 2), batch.labels, reduction="none")
        rec.append(nats.sum(1))
    best = torch.stack(rec).argmin(0)
    return torch.stack([batch.noise[row, draw] for row, draw in enumerate(best)])


def deviation_by_hand(seen):
    """The standard deviation of each number of z, (Z,): a text of s steps ago weighs
    0.99^s, and a text without a vector nothing; 0 if none has it."""
    z, valid = torch.cat(list(seen)), torch.cat([each != 0 for each in seen])
    age = torch.cat(
        [torch.full((len(each), 1), float(len(seen) - i)) for i, each in enumerate(seen)]
    )
    weight = valid * 0.99**age
    weight = weight / weight.sum(0).clamp(min=1e-30)
    mean = (weight * z).sum(0)
    return (weight * (z - mean) ** 2).sum(0).sqrt()


def disturbed_by_hand(z, batch, seen):
    """What is decoded in place of z (B, Z)."""
    if seen:
        z = torch.where(z != 0, z + batch.added * deviation_by_hand(seen), 0.0)
    return z * batch.factor


def distance_by_hand(model, first, batch, z):
    """1 - cos(P z, h) of each text, (B,); h by a loop over its tokens."""
    states = first._encode(batch.input_ids, batch.attention_mask).last_hidden_state.detach()
    head, found = model.align_head, []
    size = 2 if model.config.latent_vectors > 1 else 10**6
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        parts = states[row, :length].split(size)
        cosines = [
            torch.dot(
                F.normalize(head.weight @ own + head.bias, dim=0), F.normalize(part.mean(0), dim=0)
            )
            for own, part in zip(z[row].split(6), parts, strict=False)
        ]
        found.append(1 - torch.stack(cosines).mean())
    return torch.stack(found)


def reference(system, directory, prepared):
    """The losses and the final weights of plain torch on one process: each global batch
    at once, the contract's formula."""
    model = T5VAE.from_pretrained(directory, dtype=torch.float32).train()
    batches = TrainingBatches(
        prepared.splits["train"],
        batch_size=32,
        token_budget=10**6,
        noise_width=model.family.noise_width,
        draws=DRAWS.get(system, 1),
        deletion=0.3,
        latent_width=model.family.latent_width,
        latent_noise=LATENT_NOISE,
        latent_dropout=LATENT_DROPOUT,
        seed=1,
        rank=0,
        world_size=1,
        pad_id=0,
    )
    plain = [
        n
        for n, p in model.named_parameters()
        if p.ndim < 2
        or any(part in n for part in ("shared", "relative_attention_bias", "positions", "queries"))
    ]
    named = dict(model.named_parameters())
    if system == "lora":
        trained = ("lora_a", "lora_b", "posterior.", "injection.")
        named = {n: p for n, p in named.items() if any(part in n for part in trained)}
        plain = [n for n in plain if n in named]
        model.requires_grad_(False)
        for parameter in named.values():
            parameter.requires_grad_(True)
    groups = [
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": 0.01},
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
    ]
    if system in SCALED:  # a group per tensor
        groups = [
            {
                "params": [p],
                "lr": 2e-2 * max(1e-3, rms_of(p.detach())),
                "weight_decay": 0.0 if n in plain else 0.01,
            }
            for n, p in named.items()
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses, below, free_bits, seen = [], [], FREE_BITS.get(system, 0.2), []
    first = T5VAE.from_pretrained(directory, dtype=torch.float32).eval()
    for index in range(STEPS):
        (batch,) = batches.step(index).micro_batches
        beta = min(1.0, index / STEPS / 0.5)
        noise = best_noise(model, batch, DRAWS.get(system, 1))
        out = model(batch.input_ids, batch.attention_mask, labels=batch.labels, noise=noise)
        logits = out.logits
        if system in DISTURBED:
            decoded = disturbed_by_hand(out.latent, batch, seen)
            logits = model(latent=decoded, labels=batch.labels).logits
            seen.append(out.latent.detach())
        nats = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none").sum(1)
        rec = (nats / (batch.labels >= 0).sum(1) if system in LENGTH_WEIGHTED else nats).mean()
        tokens = batch.attention_mask.sum(1)
        kl = kl_by_hand(model, out.posterior.parameters, tokens).mean(0)
        off = index >= STEPS - RELEASED.get(system, 0)
        loss = rec + beta * torch.maximum(kl, torch.tensor(0.0 if off else free_bits)).sum()
        if system in DISTURBED:
            loss = loss + ALIGN * distance_by_hand(model, first, batch, out.latent).mean()
        if weight := TOTAL_CORRELATION.get(system):
            loss = loss + weight * information_by_hand(out.posterior.parameters)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        below.append(int((kl < free_bits).sum()))
    # free bits are at work, and not everywhere: else they would be compared with
    # nothing
    assert 0 < sum(below) < STEPS * len(kl)
    return losses, without_adapters({n: p.detach() for n, p in model.named_parameters()})


def without_adapters(weights):
    """The weights of a plain model that computes the same: W + 2 B A."""
    merged = {name: weight for name, weight in weights.items() if "lora" not in name}
    for name in [name for name in weights if name.endswith("lora_b")]:
        owner = name.removesuffix(".lora_b")
        merged[f"{owner}.weight"] = weights[f"{owner}.weight"] + 2 * (
            weights[name] @ weights[f"{owner}.lora_a"]
        )
    return merged


YELP = ROOT.parent / "shared" / "data" / "yelp"


@pytest.mark.skipif(not YELP.is_dir(), reason="the Yelp sentences are not there")
def test_yelp_cpu_agrees_at_zero_1_2_and_3(cache_dir, tmp_path):
    """The recipe on real text, two ranks, fp32: the losses of the stages are equal to
    1e-4 of their size.

    With Adam's eps at 1e-4. At 1e-8 its first steps divide near-zero gradients by
    themselves: rounding decides the direction of rare embeddings, and has grown to
    1.2e-4 of the loss by step 7. A gradient is clipped to norm 1, so 1e-4 of it is
    little beside those that decide (1e-3 each if all of the million were equal), and
    much beside rounding. Measured in five repetitions: 7e-8 at most between stages,
    nothing between runs of one. A learning rate that is 1% off makes 1e-3, and one rank
    that drops its gradient of one norm, 128 of the weights, 7e-4.
    """
    losses, few = [], tmp_path / "few.txt"  # the losses of training are compared alone
    few.write_text("".join((YELP / "test.txt").open().readlines()[:200]))
    for stage in (1, 2, 3):
        out = tmp_path / str(stage)
        train(
            "--config",
            "yelp_cpu",
            "--ds_config",
            CONFIGS / f"zero{stage}.json",
            "--precision",
            "fp32",
            "--output_dir",
            out,
            "--train_file",
            YELP / "valid.txt",
            "--valid_file",
            few,
            "--test_file",
            few,
            "--data.cache_dir",
            cache_dir,
            *("--phase1.warmup_steps", "0", "--phase2.warmup_steps", "0"),
            "--phase1.steps",
            "4",
            "--phase2.steps",
            "4",
            "--log_every",
            "1",
            "--phase1.adam_eps",
            "1e-4",
            "--phase2.adam_eps",
            "1e-4",
            ranks=2,
            script=ROOT / "tests/distributed/train_alone.py",
        )
        losses.append([row["loss"] for row in rows(out)])
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


SPLITS = [
    # system, ds_config, ranks, micro_batch_tokens: one system at every stage and split,
    # each other system at ZeRO 3, and where its own code depends on the stage
    ("memory", "zero0", 1, 10**6),
    ("memory", "zero0", 2, 150),
    ("memory", "zero1", 2, 150),
    ("memory", "zero2", 1, 150),
    ("memory", "zero2", 2, 10**6),
    ("memory", "zero2_offload", 2, 150),
    ("memory", "zero3", 3, 10**6),
    ("embedding", "zero3", 2, 150),
    ("both", "zero2", 2, 150),
    ("cross", "zero3", 2, 150),
    ("spike_slab", "zero0", 1, 10**6),
    ("spike_slab", "zero3", 2, 150),
    ("categorical", "zero1", 2, 10**6),
    ("categorical", "zero3", 2, 150),
    ("lora", "zero1", 2, 150),
    ("lora", "zero3", 2, 150),
    ("scaled", "zero0", 2, 150),
    ("scaled", "zero2_offload", 2, 150),
    ("scaled", "zero3", 2, 150),
    ("chunks", "zero0", 2, 150),
    ("chunks", "zero1", 2, 150),
    ("chunks", "zero2", 1, 10**6),
    ("chunks", "zero2", 2, 150),
    ("chunks", "zero3", 2, 150),
    ("queries", "zero0", 1, 10**6),
    ("queries", "zero1", 2, 150),
    ("queries", "zero3", 2, 150),
    ("disturbed", "zero0", 1, 10**6),
    ("disturbed", "zero2", 2, 150),
    ("disturbed chunks", "zero1", 2, 150),
    ("disturbed chunks", "zero3", 2, 150),
]
SPLITS = [(*each, False) for each in SPLITS] + [
    ("both", "zero2", 2, 150, True),
    ("cross", "zero3", 2, 150, True),
    ("spike_slab", "zero3", 2, 150, True),
    ("lora", "zero1", 2, 10**6, True),
    ("queries", "zero0", 1, 150, True),
]
"""System, ds_config, ranks, tokens of a micro-batch, and whether it is packed."""


@pytest.fixture(scope="module")
def references(prepared, tmp_path_factory):
    """By system: the start model's directory and what plain torch makes of it."""
    found = {}
    for system in SYSTEMS:
        directory = start_model(system, prepared, tmp_path_factory.mktemp(system))
        found[system] = (directory, *reference(system, directory, prepared))
    return found


@pytest.mark.parametrize(("system", "ds_config", "ranks", "tokens", "packing"), SPLITS)
def test_losses_and_weights_are_those_of_plain_torch(
    system, ds_config, ranks, tokens, packing, references, prepared, cache_dir, tmp_path
):
    start, losses, weights = references[system]
    config = {
        **TINY,
        "data": {
            **TINY["data"],
            "cache_dir": str(cache_dir),
            "micro_batch_tokens": tokens,
            "packing": packing,
        },
        "model": {"name": str(start), "latent_dim": 6, "memory_slots": 2, **SYSTEMS[system]},
        "phase2": {
            **TINY["phase2"],
            "steps": STEPS,
            "deletion": 0.3,
            "free_bits": FREE_BITS.get(system, 0.2),
            "release": RELEASED.get(system, 0) / STEPS,
            "draws": DRAWS.get(system, 1),
            "total_correlation": TOTAL_CORRELATION.get(system, 0.0),
            "length_weighted": system in LENGTH_WEIGHTED,
            **({"lr": 2e-2, "lr_scale": "rms"} if system in SCALED else {}),
            **(
                {"latent_noise": LATENT_NOISE, "latent_dropout": LATENT_DROPOUT}
                if system in DISTURBED
                else {}
            ),
        },
        "heads": {"align_weight": ALIGN if system in DISTURBED else 0.0},
        "phase": "2",
        "precision": "fp32",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    train(
        "--config",
        tmp_path / "config.yaml",
        "--ds_config",
        CONFIGS / f"{ds_config}.json",
        ranks=ranks,
    )
    found = [row["loss"] for row in rows(tmp_path / "run")]
    assert found == pytest.approx(losses, abs=2e-5, rel=2e-6)
    if last := RELEASED.get(system):
        used = [row["free_bits"] for row in rows(tmp_path / "run")]
        assert used == [FREE_BITS[system]] * (STEPS - last) + [0.0] * last
    exported = T5VAE.from_pretrained(tmp_path / "run" / "model")
    assert exported.config.lora is None
    assert {name for name, _ in exported.named_parameters()} == set(weights)
    if system == "lora":
        again = export_checkpoint(tmp_path / "run", "latest", tmp_path / "again", pytest.fail)
        found, expected = (
            load_file(d / "model.safetensors") for d in (again, tmp_path / "run" / "model")
        )
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for name, weight in exported.named_parameters():
        # Adam divides by the root of tiny second moments: where a gradient is nearly
        # zero, rounding decides its direction.
        assert (weight - weights[name]).abs().mean() < 1e-5, name

    # The evaluation at the end, sharded over ranks and weights, against one process
    # with the whole model.
    alone, _ = evaluate(
        Passes(exported, token_budget=700),
        prepared.splits["test"],
        samples=1,
        iw_samples=10,
        more=prepared.splits["train"],
    )
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    for name in (
        "rec",
        "kl",
        "elbo",
        "mi",
        "au",
        "nll_iw",
        "rec_shuffled",
        "rec_prior",
        "ppl_token",
        "kl_per_dim",
        "tokens",
    ):
        assert final[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
