"""Greedy decoding of z; of the posterior's point of a sentence: its reconstruction."""

from __future__ import annotations

from operator import eq
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data.batches import evaluation_batches, row_lengths
from dsvae.data.tokenization import TokenizedSplit
from dsvae.metrics import likelihood
from dsvae.metrics.passes import batch_of
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World


def reconstruct(
    model: T5VAE,
    split: TokenizedSplit,
    latent: Tensor,
    world: World,
    *,
    token_budget: int,
    max_tokens: int,
) -> list[NDArray[np.int64]]:
    """What `greedy` makes of z (N, Z) of the N sentences of a split, under their own
    conditions where the decoder reads any. Collective."""
    lengths = row_lengths(split, "condition") if model.config.conditional else split.lengths
    limits = {"token_budget": token_budget, "max_tokens": max_tokens}
    return greedy(model, latent, lengths, world, split, **limits)


@torch.no_grad()
def greedy(
    model: T5VAE,
    latent: Tensor,
    lengths: NDArray[np.int32],
    world: World,
    split: TokenizedSplit | None = None,
    *,
    token_budget: int,
    max_tokens: int,
) -> list[NDArray[np.int64]]:
    """The greedy decoding of z (N, Z): N arrays of token ids (T_i,), which end with EOS
    if it came within `max_tokens`. Collective.

    Args:
        lengths: (N,), the tokens that are expected of each.
        split: has the N conditions of a conditional model.
    """
    training = model.training
    model.eval()
    eos = model.config.eos_token_id
    # 1 + token id, and 0 for no token: the sum over the ranks joins the rows of all.
    ids = torch.zeros(len(latent), max_tokens, dtype=torch.int32, device=world.device)
    # Batches of similar length, so that few rows wait for the longest. A text may become
    # as long as `max_tokens`.
    lengths = np.maximum(lengths, max_tokens // 4)
    for indices, weight in evaluation_batches(
        lengths, token_budget=token_budget, rank=world.rank, world_size=world.size
    ):
        condition: dict[str, Tensor | None] = {}
        if split is not None and model.config.conditional:
            batch = batch_of(model, split, indices).to(world.device)
            condition["condition_ids"] = batch.condition_ids
            condition["condition_mask"] = batch.condition_mask
        decoded = model.generate(
            latent=latent[indices].to(world.device),
            **condition,
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
        )[:, 1:]  # without the start token
        world.heartbeat("reconstruction")
        rows = torch.from_numpy(indices[weight > 0]).to(world.device)
        ids[rows, : decoded.shape[1]] = decoded[: len(rows)].to(torch.int32) + 1
    model.train(training)
    rows_of_all = world.sum(ids).cpu().numpy().astype(np.int64)
    return [_until(row[row > 0] - 1, eos) for row in rows_of_all]


def compare(
    split: TokenizedSplit,
    references: list[str],
    decoded: list[NDArray[np.int64]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """How alike sentences and their reconstructions are.

    Args:
        references: the N sentences as the user wrote them. Decoding their tokens instead
            would count an unknown piece as recovered.
        decoded: N reconstructions as token ids, (T_i,).

    Returns:
        exact_match: share of the sentences whose reconstruction has the same text, where
            a run of white space counts as one space.
        token_accuracy: share of all tokens of the sentences (EOS included) that are at
            the same position in the reconstruction. There is no teacher forcing and no
            alignment: one inserted word makes all tokens after it wrong.
        bleu, chrf: corpus scores from 0 to 100 of the texts (sacrebleu, Post 2018),
            with their signatures.
        se: standard errors over sentences of the first two.
    """
    originals = split.rows(np.arange(len(split)))
    hypotheses = texts(decoded, tokenizer)
    exact = torch.tensor(
        [a.split() == b.split() for a, b in zip(references, hypotheses, strict=True)]
    )
    pairs = zip(originals, decoded, strict=True)
    correct = torch.tensor([sum(map(eq, a.tolist(), b.tolist())) for a, b in pairs])
    exact_match, exact_se = likelihood.mean(exact)
    token_accuracy, token_se = likelihood.ratio(correct, split.lengths)
    # `force` silences a warning about text that is already tokenized.
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
    # Cleaning up would change the text ("do n't" to "don't"), but not the reference.
    return [
        str(tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for row in shown
    ]


def _until(ids: NDArray[np.int64], eos: int) -> NDArray[np.int64]:
    """The ids up to the first EOS, which is included."""
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[0] + 1] if len(ends) else ids
