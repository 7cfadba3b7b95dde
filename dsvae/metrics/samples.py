"""How good generated texts are, by the field's names: fluency, coverage, diversity,
memory and likeness, each with a standard error over texts.

Words are those between white space. A number says little without how many texts it has
and, if a model reads them, without that model.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsvae.data import grammar
from dsvae.data.record_tokens import tokenize
from dsvae.errors import UserError
from dsvae.inference.passes import Passes
from dsvae.metrics import likelihood
from dsvae.metrics.diversity import ORDER, of_outputs, words_in_a_row
from dsvae.metrics.labelled import add

CONTEXT = 2
"""The words before a word that `NGrams` reads."""
END, UNKNOWN = "</s>", "<unk>"
LONGEST = 512
"""Tokens of a text for the language model, EOS included."""
RESAMPLES = 200
"""Draws of the histograms of MAUVE for its standard error."""
SCALE = 5.0
"""The constant c of MAUVE."""


class NGrams:
    """A trigram model of whitespace words, interpolated after Witten & Bell 1991.

    p(w|h) = (count(h w) + T(h) p(w|shorter h)) / (count(h) + T(h)), where T(h) is the
    number of different words that follow h. Below single words it is uniform over the
    vocabulary.

    Args:
        texts: what it learns from.
        vocabulary: words that it knows; every other word counts as the same one.
    """

    def __init__(self, texts: Iterable[str], vocabulary: Iterable[str]) -> None:
        self.vocabulary = {*vocabulary, END, UNKNOWN}
        self.counts: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for text in texts:
            for history, word in self.events(text):
                for start in range(len(history) + 1):
                    self.counts[history[start:]][word] += 1

    def events(self, text: str) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yields the words of a text and its end, each with the words before it."""
        known = [word if word in self.vocabulary else UNKNOWN for word in text.split()]
        padded = [END] * CONTEXT + known + [END]
        for i in range(CONTEXT, len(padded)):
            yield tuple(padded[i - CONTEXT : i]), padded[i]

    def probability(self, history: tuple[str, ...], word: str) -> float:
        """Computes p(word|history) of a word of the vocabulary."""
        below = self.probability(history[1:], word) if history else 1 / len(self.vocabulary)
        found = self.counts.get(history)
        if not found:
            return below
        return (found[word] + len(found) * below) / (found.total() + len(found))

    def perplexity(self, texts: Iterable[str]) -> tuple[float, float]:
        """Computes the perplexity per word, the end of a text counted as one, and its
        standard error."""
        nats, words = [], []
        for text in texts:
            events = list(self.events(text))
            nats.append(-sum(math.log(self.probability(*event)) for event in events))
            words.append(len(events))
        rate, se = likelihood.ratio(torch.tensor(nats, dtype=torch.float64), np.array(words))
        return math.exp(rate), math.exp(rate) * se


class Reader:
    """A language model that reads texts: how likely they are, and features of them.

    Args:
        passes: of a model without a latent.
    """

    def __init__(self, passes: Passes, tokenizer: PreTrainedTokenizerBase) -> None:
        self.passes, self.tokenizer = passes, tokenizer

    def read(self, texts: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
        """Reads the texts that are not blank.

        Returns: generative_ppl, per token (EOS included), with `se`, the number of
            `blank` texts, and of `unk`nown tokens; and the decoder's last state of each
            text, which has read all of it, (N, d).
        """
        try:
            split, _, counts = tokenize(texts, self.tokenizer, LONGEST, "the texts")
        except UserError:  # nothing but blank ones
            found = {"generative_ppl": math.nan, "blank": len(texts), "unk": 0}
            return {**found, "se": {"generative_ppl": math.nan}}, torch.zeros(0, 1)
        log_p, states = self.passes.read(split)
        values, errors = likelihood.per_unit(-log_p, split)
        return {
            "generative_ppl": values["ppl_token"],
            "blank": counts["skipped_blank"],
            "unk": counts["unk"],
            "se": {"generative_ppl": errors["ppl_token"]},
        }, states


def by_hash(texts: Iterable[str]) -> list[str]:
    """Orders texts by a hash, which is a random order, and the same for every order of
    the file."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def of_samples(
    rows: dict[str, Sequence[str]],
    reference: Sequence[str],
    training: Iterable[str] | None,
    reader: Reader,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Measures several sets of texts alike.

    Args:
        rows: name -> N texts, as many in each.
        reference: held-out texts, none of which is in a row.
        training: what the models learned from. None: `memorisation` and `copies` are
            null.
        reader: of no row, if its perplexity is to be compared.
        seed: of the texts that self-BLEU compares, and of MAUVE.

    Returns: name -> metrics.
        generative_ppl: of the texts, by the reader, per token.
        reverse_ppl: of the reference, by `NGrams` of the texts, per word. The vocabulary
            is that of the reference.
        unigram_entropy: of the words of all texts together, in nats.
        distinct_1 ... distinct_4, diversity: as of `distinct_of`.
        self_bleu: as of `dsvae.metrics.diversity`.
        memorisation, copies: as of `memory_of`.
        length_distance: the 1-Wasserstein distance of the histograms of lengths, in words.
        words: their mean.
        valid, factor_kl, pair_kl: as of `of_grammar`, if all of the reference are sentences
            of the built-in corpus.
        mauve: as of `mauve`, with the reader's states as features.
        texts, blank, unk, se.
    """
    vocabulary = {word for text in reference for word in text.split()}
    memory: dict[str, dict[str, Any]] = {}
    if training is not None:
        memory = memory_of(rows, training)
    most = max(map(len, rows.values()))
    states = reader.read(reference[:most])[1]
    known = all(map(grammar.parse, reference))
    found = {}
    for name, texts in rows.items():
        metrics, own = reader.read(texts)
        lengths = [np.array([len(text.split()) for text in side]) for side in (texts, reference)]
        pairs = {
            "reverse_ppl": NGrams(texts, vocabulary).perplexity(reference),
            "unigram_entropy": unigram_entropy(texts),
            **distinct_of(texts),
            "length_distance": wasserstein(*lengths),
            "words": likelihood.mean(torch.from_numpy(lengths[0])),
            "mauve": mauve(own.numpy(), states.numpy(), seed),
        }
        values = {key: value for key, (value, _) in pairs.items()}
        add(metrics, {**values, "se": {key: error for key, (_, error) in pairs.items()}})
        if known:
            add(metrics, of_grammar(texts))
        outputs = of_outputs(texts, seed)
        add(metrics, {"self_bleu": outputs["self_bleu"], "se": outputs["se"]})
        nothing = {"memorisation": math.nan, "copies": math.nan, "se": {}}
        add(metrics, memory.get(name, nothing))
        found[name] = {"texts": len(texts), **metrics}
    return found


def of_grammar(texts: Sequence[str]) -> dict[str, Any]:
    """Measures texts against the built-in corpus, whose distribution is known.

    Returns: `valid`, the share of the texts that are sentences of it, with `se`. Of the
        valid ones, `factor_kl` and `pair_kl`, the largest KL in nats from the empirical
        distribution of a factor, or of two factors, to the true one, which is uniform. A
        sample of the corpus itself has about (values - 1) / (2 N).
    """
    parsed = [grammar.parse(text) for text in texts]
    value, error = likelihood.mean(torch.tensor([float(each is not None) for each in parsed]))
    rows = [each for each in parsed if each is not None]

    def kl(*names: str) -> float:
        counts = Counter(tuple(row[name] for name in names) for row in rows)
        total = math.prod(len(grammar.FACTORS[name]) for name in names)
        shares = (count / len(rows) for count in counts.values())
        return sum(share * math.log(share * total) for share in shares) if rows else math.nan

    return {
        "valid": value,
        "factor_kl": max(map(kl, grammar.FACTORS)),
        "pair_kl": max(kl(*pair) for pair in itertools.combinations(grammar.FACTORS, 2)),
        "se": {"valid": error},
    }


def unigram_entropy(texts: Sequence[str]) -> tuple[float, float]:
    """Computes the entropy of the words of all texts together, in nats, and its standard
    error; NaN without words. It grows with the number of texts."""
    counts = Counter(word for text in texts for word in text.split())
    total = counts.total()
    if not total:
        return math.nan, math.nan
    nats = [
        sum((math.log(total / counts[word]) for word in text.split()), start=0.0) for text in texts
    ]
    # The change of ln p adds nothing: the changes of p sum to 0.
    words = np.array([len(text.split()) for text in texts])
    return likelihood.ratio(torch.tensor(nats, dtype=torch.float64), words)


def distinct_of(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Computes how many of the n-grams of all texts together are different, and standard
    errors by the jackknife over texts.

    Returns: distinct_1 ... distinct_4 (Li et al. 2016), different n-grams / n-grams; and
        diversity, the product of distinct_2, distinct_3 and distinct_4 (Lovelace et al.
        2023). All fall with the number of texts. NaN if no text has so many words.
    """
    shares = {}
    for n in range(1, ORDER + 1):
        grams = [words_in_a_row(text, n) for text in texts]
        texts_with = Counter(gram for each in grams for gram in set(each))
        # What is left without one text: its own n-grams go, and those of no other text.
        only = np.array([sum(texts_with[gram] == 1 for gram in set(each)) for each in grams])
        total = np.array([len(each) for each in grams])
        with np.errstate(invalid="ignore"):
            without = (len(texts_with) - only) / (total.sum() - total)
            shares[f"distinct_{n}"] = len(texts_with) / total.sum(), without
    value, without = (np.prod([shares[f"distinct_{n}"][i] for n in (2, 3, 4)], 0) for i in (0, 1))
    shares["diversity"] = value, without
    return {
        name: (float(value), _jackknife(np.asarray(without)))
        for name, (value, without) in shares.items()
    }


def _jackknife(without: NDArray[np.float64]) -> float:
    """Computes a standard error from the values without each of N texts."""
    count = len(without)
    return math.sqrt(float(without.var()) * (count - 1)) if count > 1 else math.nan


def memory_of(rows: dict[str, Sequence[str]], training: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Measures how much of texts stands in the training texts, which are read once.

    Returns: name of a row -> `memorisation`, `copies`, and `se`.
        memorisation: share of the 4-grams of a text that lie in one training text, the
            largest over training texts, mean over the texts that have four words.
        copies: share of the texts that are a training text, word for word.
    """
    grams = {
        name: [words_in_a_row(text, ORDER) for text in texts if text.strip()]
        for name, texts in rows.items()
    }
    wanted = {gram for each in grams.values() for text in each for gram in text}
    lines: dict[tuple[str, ...], list[int]] = defaultdict(list)
    texts_of_rows = {" ".join(text.split()) for texts in rows.values() for text in texts}
    seen = set()
    for number, text in enumerate(training):
        for gram in wanted.intersection(words_in_a_row(text, ORDER)):
            lines[gram].append(number)
        if (plain := " ".join(text.split())) in texts_of_rows:
            seen.add(plain)
    found = {}
    for name, texts in rows.items():
        shares = []
        for own in filter(None, grams[name]):
            hits = Counter(line for gram in own for line in lines.get(gram, ()))
            shares.append(max(hits.values(), default=0) / len(own))
        copied = torch.tensor([" ".join(text.split()) in seen for text in texts])
        copies, copies_se = likelihood.mean(copied)
        share, se = likelihood.mean(torch.tensor(shares)) if shares else (math.nan, math.nan)
        found[name] = {
            "memorisation": share,
            "copies": copies,
            "se": {"memorisation": se, "copies": copies_se},
        }
    return found


def wasserstein(one: NDArray[np.integer], other: NDArray[np.integer]) -> tuple[float, float]:
    """Computes the 1-Wasserstein distance of two samples of whole numbers of at least 0,
    and its standard error by linearization."""
    size = int(max(one.max(), other.max())) + 1
    below = [np.bincount(x, minlength=size).cumsum() / len(x) for x in (one, other)]
    sign = np.sign(below[0] - below[1])
    # A number adds to the share below k for every k that is not smaller.
    adds = sign[::-1].cumsum()[::-1]
    variance = sum(float(adds[x].var()) / max(1, len(x) - 1) for x in (one, other))
    return float(np.abs(below[0] - below[1]).sum()), math.sqrt(variance)


def mauve(
    features: NDArray[np.floating], reference: NDArray[np.floating], seed: int
) -> tuple[float, float]:
    """Computes MAUVE (Pillutla et al. 2021) by the package mauve-text with its defaults,
    and a standard error; NaN without the package, or for fewer than 20 texts.

    The error is the deviation of `RESAMPLES` bootstrap draws of both histograms. It does
    not count that other texts would give other clusters.

    Args:
        features: (N, d) of texts.
        reference: (M, d) of the texts that they should be like.
        seed: of k-means, and of the bootstrap.
    """
    if not has_mauve() or min(len(features), len(reference)) < 20:
        return math.nan, math.nan
    from mauve import compute_mauve

    found = compute_mauve(features, reference, seed=seed % 2**31, verbose=False)
    rng = np.random.default_rng(seed)
    sides = ((found.p_hist, len(features)), (found.q_hist, len(reference)))
    drawn = [
        frontier(*(rng.multinomial(count, shares) / count for shares, count in sides))
        for _ in range(RESAMPLES)
    ]
    return float(found.mauve), float(np.std(drawn, ddof=1))


def has_mauve() -> bool:
    """Tells whether the package mauve-text can be used."""
    try:
        import mauve  # noqa: F401
    except ImportError:
        return False
    return True


def frontier(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Computes MAUVE of two histograms (K,): the area under the curve of exp(-c KL(q||r))
    against exp(-c KL(p||r)) for mixtures r of them."""

    def kl(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        some = a > 0
        return float((a[some] * np.log(a[some] / b[some])).sum())

    mixtures = [w * p + (1 - w) * q for w in np.linspace(1e-6, 1 - 1e-6, 25)]
    curve = [(math.exp(-SCALE * kl(q, r)), math.exp(-SCALE * kl(p, r))) for r in mixtures]
    x, y = np.array([(0.0, 1.0), *curve, (1.0, 0.0)]).T
    order = np.lexsort((-y, x))
    steps = np.diff(x[order]) * (y[order][1:] + y[order][:-1]) / 2
    return float(steps.sum())
