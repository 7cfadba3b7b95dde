"""Reconstruction: what comes back when the posterior mean of a sentence is decoded
greedily."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data.batches import evaluation_batches
from dsvae.data.tokenization import TokenizedSplit
from dsvae.metrics import likelihood
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World


@torch.no_grad()
def reconstruct(
    model: T5VAE,
    split: TokenizedSplit,
    latent: Tensor,
    world: World,
    *,
    token_budget: int,
    max_tokens: int,
) -> list[NDArray[np.int64]]:
    """The greedy decoding of z (N, Z): N times token ids (T_i,), EOS last where it came
    within `max_tokens`. Collective."""
    training = model.training
    model.eval()
    eos = model.config.eos_token_id
    # One row a sentence, 0 where no token stands, so that the sum over the ranks puts
    # all rows together.
    ids = torch.zeros(len(split), max_tokens, dtype=torch.int32, device=world.device)
    # Of sentences of similar length, so that few rows wait for the longest; a
    # reconstruction may be as long as `max_tokens`.
    lengths = np.maximum(split.lengths, max_tokens // 4)
    for indices, weight in evaluation_batches(
        lengths, token_budget=token_budget, rank=world.rank, world_size=world.size
    ):
        decoded = model.generate(
            latent=latent[indices].to(world.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
        )[:, 1:]  # the start token first
        rows = torch.from_numpy(indices[weight > 0]).to(world.device)
        ids[rows, : decoded.shape[1]] = decoded[: len(rows)].to(torch.int32) + 1
    model.train(training)
    found = world.sum(ids).cpu().numpy().astype(np.int64)
    return [_until(row[row > 0] - 1, eos) for row in found]


def compare(
    split: TokenizedSplit,
    references: list[str],
    decoded: list[NDArray[np.int64]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """How alike sentences and their reconstructions are.

    Args:
        references: the N sentences as the user wrote them. The tokenizer's own round
            trip would count an unknown piece as recovered.
        decoded: N reconstructions as token ids, (T_i,).

    Returns:
        exact_match: share of the sentences whose reconstruction has the same text; a
            run of white space counts as one space.
        token_accuracy: share of all tokens of the sentences (EOS included) that stand
            at the same position of the reconstruction. Nothing is teacher-forced and
            nothing aligned: one inserted word makes all behind it wrong.
        bleu, chrf: corpus scores from 0 to 100 of the texts (sacrebleu, Post 2018),
            with their signatures.
        se: standard errors over sentences of the first two.
    """
    originals = split.rows(np.arange(len(split)))
    hypotheses = texts(decoded, tokenizer)
    exact = torch.tensor(
        [a.split() == b.split() for a, b in zip(references, hypotheses, strict=True)]
    )
    correct = torch.tensor([_same(a, b) for a, b in zip(originals, decoded, strict=True)])
    exact_match, exact_se = likelihood.mean(exact)
    token_accuracy, token_se = likelihood.ratio(correct, split.lengths)
    # `force`: no lecture on stderr where the corpus itself is tokenized.
    bleu, chrf = BLEU(force=True), CHRF()
    return {
        "exact_match": exact_match,
        "token_accuracy": token_accuracy,
        "bleu": bleu.corpus_score(hypotheses, [references]).score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "se": {"exact_match": exact_se, "token_accuracy": token_se},
    }


def texts(rows: list[NDArray[np.int64]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Token ids as text, without EOS and padding; an unknown piece stays visible."""
    hidden = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    shown = [row[~np.isin(row, hidden)].tolist() for row in rows]
    # Cleaning up would rewrite the text ("do n't" to "don't") as no reference has it.
    return [
        str(tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for row in shown
    ]


def _same(original: NDArray[np.int64], decoded: NDArray[np.int64]) -> int:
    common = min(len(original), len(decoded))
    return int((original[:common] == decoded[:common]).sum())


def _until(ids: NDArray[np.int64], eos: int) -> NDArray[np.int64]:
    """Up to and with the first EOS."""
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[0] + 1] if len(ends) else ids
