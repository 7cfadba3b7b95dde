"""Text samples at ZeRO 3 on ranks that decode sentences of different lengths."""

import sys
from pathlib import Path

import deepspeed
import numpy as np
import torch

from dsvae.data.grammar import generate
from dsvae.data.record_tokens import tokenize
from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.inference.passes import Passes
from dsvae.metrics.reconstruction import samples
from dsvae.parallel.world import join, leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_models import make_vae, small_tokenizer

world = join()
lend_to_deepspeed(world)
sentences = [drawn.text for drawn in generate(20, seed=3)]
tokenizer = small_tokenizer(sentences)
split = tokenize(sentences, tokenizer, 64, "test")[0]
model, *_ = deepspeed.initialize(
    model=make_vae(),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    },
)
passes = []
model.module.register_forward_hook(lambda *_: passes.append(0))
eos = model.module.config.eos_token_id


def diverge(module, arguments, output):
    """Different rounding of a close argmax: rank 0 sees EOS at once, rank 1 never."""
    if output.logits is not None:
        output.logits[..., eos] = torch.inf if world.rank == 0 else -torch.inf
    return output


model.module.register_forward_hook(diverge)
inference = Passes(model.module, world, token_budget=4096)
pairs, prior = samples(inference, split, inference.encode(split), tokenizer, np.arange(2), 12)
print(f"rank {world.rank}: {len(passes)} passes, {len(prior[0])} and {len(prior[1])} characters")
sys.stdout.flush()
leave(world)
