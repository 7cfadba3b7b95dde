"""Greedy decoding of z, and how alike sentences and their reconstructions are."""

from __future__ import annotations

from operator import eq
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data.batches import row_lengths
from dsvae.data.noise import PRIOR
from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Encoded, Passes, Rows, by_rows, texts_of
from dsvae.metrics import likelihood
from dsvae.metrics.evaluate import EVALUATION_SEED


def generate(
    passes: Passes, latent: Tensor, max_tokens: int, split: TokenizedSplit | None = None
) -> list[Rows]:
    """Decodes z (N, Z) greedily: token ids (T_i,), which end with EOS if it came
    within `max_tokens`. Collective.

    Args:
        split: the N sentences that z stands for, which have the conditions of a
            conditional model.
    """
    conditions, lengths = None, np.ones(len(latent), dtype=np.int32)
    if split is not None:
        lengths = split.lengths
        if passes.model.config.conditional:
            conditions = split.conditions(range(len(split)))
            lengths = row_lengths(split, "condition")
    return passes.generate(
        latent,
        conditions,
        # Few rows wait for the longest. A text may become as long as `max_tokens`.
        np.maximum(lengths, max_tokens // 4),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
    )


def samples(
    passes: Passes,
    split: TokenizedSplit,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_tokens: int,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Decodes greedily: (sentence, reconstruction from the posterior mean) of the
    sentences `rows` of a split, and as many sentences with z from the prior.
    Collective.

    A language model has no z and so a single greedy sentence: it gets that sentence and
    no pairs. With conditions, each sentence is decoded for its own, which stands before
    those of the prior.

    Args:
        encoded: of all sentences of the split.
    """
    config = passes.model.config
    if not config.has_latent and not config.conditional:
        rows = rows[:1]
    if not len(rows):
        return [], []
    keys = [(0, key) for key in split.content_keys[rows].tolist()]
    noise = passes.noise(EVALUATION_SEED, PRIOR, keys)
    drawn = by_rows(passes.family, encoded.prior)(rows).sample(noise)
    own = rows if config.has_latent else rows[:0]
    latent = torch.cat([encoded.posterior.point[own], drawn])
    conditions = split.select([*own, *rows]) if config.conditional else None
    decoded = texts_of(generate(passes, latent, max_tokens, conditions), tokenizer)
    from_prior = decoded[len(own) :]
    if conditions is not None:
        names = texts_of(split.conditions(rows) or [], tokenizer)
        from_prior = [f"{name} -> {text}" for name, text in zip(names, from_prior, strict=True)]
    originals = texts_of(split.rows(own), tokenizer)
    return list(zip(originals, decoded[: len(own)], strict=True)), from_prior


def compare(
    split: TokenizedSplit,
    references: list[str],
    decoded: list[NDArray[np.int64]],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Measures how alike sentences and their reconstructions are.

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
    hypotheses = texts_of(decoded, tokenizer)
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
