"""Operations, memory and speed, compared with torch's count of operations and the
kernel's count of memory."""

import itertools

import numpy as np
import pytest
import torch
from small_models import INJECTIONS, make_vae
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsvae.data.batches import Step, collate_split
from dsvae.engine.weights import freeze_decoder, freeze_pretrained
from dsvae.generation.inputs import Inputs
from dsvae.metrics import throughput
from dsvae.metrics.throughput import ModelFlops, Speed, peak_flops, peak_memory

SOURCE, TARGET = 7, 9
"""Tokens per sentence in the encoder, where some are deleted, and in the decoder."""


def batch_of(source, target, latent_dim, weight=None):
    """Sentences with the given numbers of tokens."""
    count = len(target)
    return collate_split(
        Inputs([[5] * length for length in target]),
        np.arange(count),
        pad_id=0,
        noise=np.zeros((count, latent_dim), np.float32),
        weight=np.array([1] * count if weight is None else weight, np.float32),
        disturb=lambda i, _: np.full(source[i], 5),
    )


def counted_by_torch(model, batch):
    """A forward and backward pass through the whole loss. Attention uses the plain
    kernel, since torch does not count the others on every device. Rotary positions are
    left out: transformers 5.17 makes them by a matrix product, later ones do not."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(batch.input_ids, batch.attention_mask, labels=batch.labels, noise=batch.noise)
        loss = out.logits.logsumexp(-1).sum()
        if model.config.latent_dim:
            loss = loss + out.posterior.kl(out.prior).sum()
        loss.backward()
    of_positions = (
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.endswith("rotary_emb")
    )
    return counter.get_total_flops() - sum(of_positions)


KINDS = itertools.product(("t5 v1.0", "t5 v1.1", "umt5"), (*INJECTIONS, "none"))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize(("kind", "injection"), [*KINDS, ("t5gemma", "cross")])
def test_everything_trains(kind, injection, pooling):
    model = make_vae(kind, injection=injection, pooling=pooling).train()
    batch = batch_of([SOURCE] * 3, [TARGET] * 3, model.config.latent_dim)
    assert ModelFlops.of(model).count(batch) == counted_by_torch(model, batch)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_decoder_is_frozen(injection):
    """Its weights have no gradient, but z has one through it. With z in the memory
    slots or in cross-attention alone, nothing needs the gradients of the first layer's
    queries and input there; the formula counts them all the same."""
    model = make_vae(injection=injection).train()
    freeze_decoder(model)
    batch = batch_of([SOURCE] * 3, [TARGET] * 3, 6)
    t5, slots, not_needed = model.config.t5, 2, 0
    width = t5.num_heads * t5.d_kv
    if injection == "memory":
        projections, scores = 3 * t5.d_model * width, (TARGET + slots) * width
        not_needed = 2 * TARGET * (projections + scores)
    if injection == "cross":
        # all of self-attention, and the queries of cross-attention
        own = 4 * t5.d_model * width + 4 * TARGET * width
        not_needed = 2 * TARGET * (own + t5.d_model * width + slots * width)
    formula = ModelFlops.of(model).count(batch)
    assert formula - 3 * not_needed == counted_by_torch(model, batch)
    assert formula < ModelFlops.of(make_vae(injection=injection)).count(batch)


def test_adapters_are_counted_beside_their_frozen_matrices():
    lora = {"rank": 2, "alpha": 16, "targets": ["k", "wo"]}
    flops = []
    for given in (None, lora):
        model = make_vae(lora=given)
        freeze_pretrained(model)
        flops.append(ModelFlops.of(model))
    plain, adapted = flops
    # q, k, v, o: 32 x 48; wi, wo: 32 x 48; adapters of k: 2 x (32 + 48), of wo alike
    assert plain.encoder_token == 2 * 6 * (6 * 32 * 48)
    assert adapted.encoder_token == 2 * (4 * (6 * 32 * 48) + 6 * 2 * (2 * 80))
    assert adapted.decoder_token == 3 / 2 * adapted.encoder_token + 4 * 60 * 32
    assert adapted.sentence == plain.sentence


def test_padding_and_fillers_are_no_work():
    flops = ModelFlops.of(make_vae())
    sizes = [(7, 9), (3, 4), (1, 2)]
    alone = [flops.count(batch_of([source], [target], 6)) for source, target in sizes]
    together = batch_of([7, 3, 1], [9, 4, 2], 6, weight=[1, 1, 0])
    assert flops.count(together) == pytest.approx(alone[0] + alone[1], rel=1e-12)


def test_weights_that_a_rank_does_not_hold_count():
    """ZeRO 3 leaves a parameter empty and stores its size in an attribute."""
    model = make_vae()
    whole = ModelFlops.of(model)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert ModelFlops.of(model) == whole


def test_speed_between_two_readings(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda precision: {"bf16": 1e9}[precision])
    model = make_vae()
    batch = batch_of([7, 3], [9, 4], 6)
    of_the_batch = ModelFlops.of(model).count(batch)
    speed = Speed(model, "bf16")
    for _ in range(3):
        # 26 tokens on two ranks, of which this one has two micro-batches
        speed.count(Step([batch, batch], 8, 52))
    clock[0] += 4.0
    found = speed.read()
    assert found["tokens_per_s"] == 3 * 52 / 4
    assert found["flops_per_s"] == pytest.approx(6 * of_the_batch / 4)
    assert found["mfu"] == pytest.approx(6 * of_the_batch / 4 / 1e9)
    clock[0] += 1.0
    assert speed.read()["tokens_per_s"] == 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),  # no A40
        ("NVIDIA A10G", None),  # no A10
        ("Some Other 100", None),
    ],
)
def test_the_peak_of_a_device(monkeypatch, name, teraflops):
    monkeypatch.setattr(throughput, "local_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("bf16") == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops("fp32") is None


def test_a_run_on_the_cpu_of_a_gpu_machine_reports_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 3)
    assert peak_flops("bf16") == 989e12
    assert peak_memory() == 3
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert peak_flops("bf16") is None
    assert peak_memory() >= 50_000_000


def test_peak_memory_is_what_the_kernel_says():
    """On CPU it is the peak of the resident memory, which never falls."""
    if torch.accelerator.is_available():
        pytest.skip("a GPU's memory is counted by torch")
    before = resident_peak()
    held = torch.ones(50_000_000)  # 200 MB
    del held
    assert peak_memory() >= before
    assert peak_memory() == pytest.approx(resident_peak(), rel=0.02)


def resident_peak():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def test_peak_memory_of_a_gpu_is_that_of_its_allocator(monkeypatch):
    monkeypatch.setattr(throughput, "local_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 3_000_000_000)
    assert peak_memory() == 3_000_000_000
