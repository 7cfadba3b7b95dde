"""docs/python.md: what it tells people to run, and the Trainer against plain torch."""

import re

import pytest
import torch
from launch import ROOT
from small_models import make_vae, plain_nats
from torch.distributions import Normal, kl_divergence

import dsvae
from dsvae import T5VAE
from dsvae.data import grammar

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def test_the_page_trains_in_a_loop_and_with_the_trainer(pretrained_t5, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    sentences = [drawn.text for drawn in grammar.generate(320, seed=1)]
    (tmp_path / "train.txt").write_text("\n".join(sentences))
    names = {}
    for block in BLOCKS:
        exec(block.replace("google-t5/t5-small", str(pretrained_t5)), names)
    tokenizer = names["tokenizer"]
    batch = tokenizer(sentences[:32], padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    torch.manual_seed(0)
    fresh = T5VAE.from_t5(pretrained_t5, latent_dim=32)
    before = fresh.eval()(**batch, labels=labels).loss
    for directory in ("loop", "trainer/model"):
        trained = T5VAE.from_pretrained(directory).eval()
        assert trained.config.beta == 0.5
        loss = trained(**batch, labels=labels).loss
        assert loss < 0.9 * before, directory


def test_the_trainer_accumulates_the_loss_per_sentence(tmp_path):
    """Two micro-batches per step, by SGD, against the formula by torch.distributions."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rng = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(3, 60, (5,), generator=rng),
            "noise": torch.randn(6, generator=rng),
        }
        for _ in range(8)
    ]
    seen = []

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        seen.append(batch)
        return {**batch, "labels": batch["input_ids"]}

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-2)

    model, plain = make_vae(beta=0.7), make_vae(beta=0.7).train()
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizers = (sgd(model), None)
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=collate, optimizers=optimizers
    )
    trainer.train()
    assert len(seen) == 4
    optimizer = sgd(plain)
    for pair in (seen[:2], seen[2:]):
        whole = {name: torch.cat([each[name] for each in pair]) for name in pair[0]}
        ids, noise = whole["input_ids"], whole["noise"]
        q = plain.encode(ids)
        z = q.mean + (0.5 * q.logvar).exp() * noise
        kl = kl_divergence(Normal(q.mean, (0.5 * q.logvar).exp()), Normal(0.0, 1.0)).sum(-1)
        rec = plain_nats(plain(latent=z, labels=ids).logits, ids)
        optimizer.zero_grad()
        (rec + 0.7 * kl).mean().backward()
        optimizer.step()
    before = dict(make_vae(beta=0.7).named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name), weight, atol=1e-4, rtol=1e-3, msg=name
        )
        assert not torch.equal(weight, before[name]), name


def test_the_public_names_are_listed():
    for name in dsvae.__all__:
        assert name in dir(dsvae)
        assert getattr(dsvae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SentenceVAEs'"):
        _ = dsvae.SentenceVAEs
