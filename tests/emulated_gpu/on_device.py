"""What runs in a process that has the emulated GPU; test_emulated_gpu.py starts it."""

import os
from pathlib import Path

import emulated
import pytest
import torch
from count import count
from deepspeed.utils import logger
from torch.nn import functional as F
from transformers import AutoTokenizer

from dsvae import T5VAE
from dsvae.generation.sentence_vae import SentenceVAE
from dsvae.parallel.world import joined

emulated.install()
logger.setLevel("WARNING")
DEVICE = torch.device("emulated", 0)


@pytest.fixture(scope="module")
def world():
    with joined() as world:  # one for all: DeepSpeed keeps its groups for the life of a process
        yield world


def there(*size, **kwargs):
    return torch.randn(*size, **kwargs).to(DEVICE)


@pytest.mark.parametrize(
    "do",
    [
        lambda: there(3) + torch.randn(3),
        lambda: torch.randn(3).add_(there(3)),
        lambda: torch.randn(()).add_(there(())),
        lambda: there(2, 2) @ torch.randn(2, 2),
        lambda: F.embedding(torch.tensor([1]), there(3, 2)),
        lambda: torch.cat([there(3), torch.randn(3)]),
        lambda: torch.stack([there(()), torch.tensor(1.0)]),
        lambda: there(3) + torch.randn(3, device="emulated:1"),
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
        lambda: F.scaled_dot_product_attention(*[there(1, 2, 3, 4)] * 2, torch.randn(1, 2, 3, 4)),
        lambda: torch.distributed.all_reduce(torch.ones(2)),
        lambda: there(3).numpy(),
        lambda: torch.zeros(1, device="emulated:99"),
    ],
)
def test_it_refuses_what_cuda_refuses(do, world):
    with pytest.raises((RuntimeError, TypeError)):
        do()


def test_it_allows_what_cuda_allows(world):
    assert (there(3) * torch.tensor(2.0)).device == DEVICE  # a number
    assert there(3)[torch.tensor([0, 1])].shape == (2,)
    total = torch.ones(2, device=DEVICE)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("do", "kernels", "waits", "copies"),
    [
        (lambda x: x + 1, 1, 0, 0),
        (lambda x: x.view(-1)[2:].t(), 0, 0, 0),
        (lambda x: x.t().contiguous(), 1, 0, 0),
        (lambda x: torch.empty(9, device=DEVICE), 0, 0, 0),
        (lambda x: x.sum().item(), 1, 1, 0),
        (lambda x: bool(x.sum() > 0), 2, 1, 0),
        (lambda x: x[x > 0], 3, 1, 0),
        (lambda x: x.index_put_((x > 0,), x[0, 0]), 2, 1, 0),
        (lambda x: x.nonzero(), 1, 1, 0),
        (lambda x: x.cpu(), 0, 1, 1),
        (lambda x: torch.tensor(1.0, device=DEVICE), 0, 1, 1),
        (lambda x: torch.ones(3).to(DEVICE, non_blocking=True), 0, 0, 1),
        (lambda x: torch.accelerator.synchronize(), 0, 1, 0),
        (lambda x: torch._foreach_mul_([x, x], 2), 1, 0, 0),
        (lambda x: F.rms_norm(x, (3,), x[0]), 1, 0, 0),
        (lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 2, 3)] * 3), 1, 0, 0),
        (lambda x: F.dropout(x, 0.5), 1, 0, 0),
    ],
)
def test_counts(do, kernels, waits, copies):
    x = there(2, 3)
    with emulated.counting() as counts:
        do(x)
    found = [emulated.total(counts, kind) for kind in ("kernels", "wait", "copies")]
    assert found == [kernels, waits, copies], dict(counts)


def test_pinned_memory_is_told_from_pageable():
    pinned = torch.ones(5).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(5).is_pinned()
    with emulated.counting() as counts:
        pinned.to(DEVICE)
        torch.ones(3).to(DEVICE)
    assert counts["bytes to device pinned"] == 20
    assert counts["bytes to device pageable"] == 12


def test_memory():
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    x = torch.ones(1000, device=DEVICE)
    x = x + 1
    assert torch.accelerator.memory_allocated() - before == 4000
    assert torch.accelerator.max_memory_allocated() - before == 8000
    del x
    assert torch.accelerator.memory_allocated() == before


def test_autocast_has_the_lists_of_cuda():
    x = there(2, 2)
    with torch.autocast("emulated", dtype=torch.bfloat16):
        assert F.linear(x, x).dtype == torch.bfloat16
        assert torch.softmax(x @ x, -1).dtype == torch.float32
        assert (x @ x).exp().dtype == torch.float32


def test_attention_and_its_gradients():
    """Against the formula on the CPU, with dropout: both draw the same numbers."""
    found = {}
    given = [torch.randn(2, 3, 5, 4) for _ in range(3)] + [torch.randn(1, 3, 5, 5)]
    for device in ("cpu", DEVICE):
        q, k, v, bias = (x.clone().to(device).requires_grad_() for x in given)
        torch.manual_seed(1)
        if device == "cpu":
            weights = F.dropout((q @ k.mT / 2 + bias).softmax(-1), 0.3)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.3)
        (out**2).sum().backward()
        found[device] = [out, *(x.grad for x in (q, k, v, bias))]
    for on_cpu, on_device in zip(*found.values(), strict=True):
        torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_cpu():
    """The model that the command trained on the device."""
    directory = Path(os.environ["MODEL"])
    texts = ["the cat sleeps", "a dog", "we see the old house"]
    found = {}
    for device in ("cpu", DEVICE):
        model = T5VAE.from_pretrained(directory).to(device).eval()
        vae = SentenceVAE(model, AutoTokenizer.from_pretrained(directory))
        latents = vae.encode(texts).mean
        found[device] = [vae.decode(latents), latents.cpu()]
    assert found["cpu"][0] == found[DEVICE][0]
    torch.testing.assert_close(found["cpu"][1], found[DEVICE][1], rtol=1e-4, atol=1e-5)


# Kernels, waits and copies of a step with one micro-batch and with three, and peak MB:
# a few percent more than `count.py --layers 2` found.
BARS = {
    "zero0": ((910, 3, 7), (2490, 3, 17), 2),
    "zero1": ((900, 3, 6), (2490, 3, 16), 2),
    "zero2": ((1040, 6, 7), (2740, 8, 17), 2.2),
    "zero3": ((980, 5, 7), (2580, 7, 17), 2),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", BARS)  # zero3 last: DeepSpeed replaces torch's linear for good
def test_a_step_costs_no_more(world, name, micro_batches):
    found = count(world, name, layers=2, micro_batches=micro_batches)
    kernels, waits, copies = BARS[name][micro_batches > 1]
    print(found)
    assert found["kernels"] <= kernels
    assert found["wait"] <= waits
    assert found["copies"] <= copies
    assert found["peak_bytes"] <= BARS[name][2] * 1e6
