"""What sentences come from which z: from the prior, from posteriors, from fitted priors.

    python tests/benchmarks/prior_samples.py MODEL_DIR LANGUAGE_MODEL_DIR
        --train_file F --test_file F [--samples 1000] [--output results.json]

The rows, each with as many sentences:

- real: test sentences, drawn without replacement;
- prior: z from the model's prior;
- aggregate: z from q(z|x) of random training sentences;
- gaussian, gmm, flow: z from a density that was fitted to one draw of q(z|x) per training
  sentence, as `dsvae fit_prior` fits it.

The columns:

- gain: mean log p(z) over held-out draws, minus that under the model's prior, in nats;
- ppl: fluency, the perplexity per token of a language model (trained with --injection
  none). Plain sentences have a low one;
- reverse_ppl: coverage, the perplexity per word of the other test sentences under an
  n-gram model of the row's sentences (`NGrams`);
- self_bleu: of 500 sentences (`dsvae.metrics.diversity`);
- copies: share that stands in the training file, word for word;
- words: whitespace words per sentence.

Each source is decoded twice: greedily, so that only z varies, and with tokens that are
drawn. Standard errors are over sentences, and do not count that densities were fitted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.command import run
from benchmarks.labelled import longest
from benchmarks.style_transfer import perplexity

from dsvae import pretrained
from dsvae.data.readers import read_file
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE, fitted_prior
from dsvae.generation.options import PriorKind
from dsvae.generation.reading import draw_sentences
from dsvae.metrics import likelihood
from dsvae.metrics.diversity import of_outputs
from dsvae.reports.table import error, markdown, number

ORDER = 3
END, UNKNOWN = "</s>", "<unk>"
SHOWN = 8
DECODINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True}}


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

    def events(self, text: str) -> Iterable[tuple[tuple[str, ...], str]]:
        """The words of a text and its end, each with the words before it."""
        known = [word if word in self.vocabulary else UNKNOWN for word in text.split()]
        padded = [END] * (ORDER - 1) + known + [END]
        for i in range(ORDER - 1, len(padded)):
            yield tuple(padded[i - ORDER + 1 : i]), padded[i]

    def probability(self, history: tuple[str, ...], word: str) -> float:
        """p(word|history) of a word of the vocabulary."""
        below = self.probability(history[1:], word) if history else 1 / len(self.vocabulary)
        found = self.counts.get(history)
        if not found:
            return below
        return (found[word] + len(found) * below) / (found.total() + len(found))

    def perplexity(self, texts: Sequence[str]) -> tuple[float, float]:
        """Per word, the end of a sentence counted as one, and its standard error."""
        nats, words = [], []
        for text in texts:
            events = list(self.events(text))
            nats.append(-sum(math.log(self.probability(*event)) for event in events))
            words.append(len(events))
        rate, se = likelihood.ratio(torch.tensor(nats, dtype=torch.float64), np.array(words))
        return math.exp(rate), math.exp(rate) * se


def read(file: str) -> list[str]:
    """The sentences of a file that are not blank."""
    return [text.strip() for text in read_file(Path(file), "FILE", "text") if text.strip()]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All results, as in the JSON file."""
    train, test = read(args.train_file), read(args.test_file)
    if len(test) <= args.samples:
        raise UserError(f"{len(test)} test sentences: give more than --samples ({args.samples})")
    model, tokenizer = pretrained.load(args.model_dir)
    vae = SentenceVAE(model, tokenizer, max_tokens=longest(model))
    language_model = pretrained.load(args.language_model_dir)
    if language_model[0].config.injection != "none":
        raise UserError(f"{args.language_model_dir} has a latent: give a model of injection none")
    order = np.random.default_rng(args.seed).permutation(len(test))
    real = [test[i] for i in order[: args.samples]]
    others = [test[i] for i in order[args.samples :]]

    draws = fitted_prior.draw(vae, train, args.seed)
    priors = {kind: fitted_prior.fit(draws, kind, seed=args.seed) for kind in get_args(PriorKind)}
    fits = {
        kind: fitted_prior.compare(vae, prior, draws.held_out) for kind, prior in priors.items()
    }
    known, vocabulary = set(train), {word for text in train for word in text.split()}

    def row_of(texts: list[str]) -> dict[str, Any]:
        row = perplexity(*language_model, texts)
        row["reverse_ppl"], row["reverse_ppl_se"] = NGrams(texts, vocabulary).perplexity(others)
        diversity = of_outputs(texts, args.seed)
        row["self_bleu"], row["self_bleu_se"] = diversity["self_bleu"], diversity["se"]["self_bleu"]
        copies = torch.tensor([text in known for text in texts])
        words = torch.tensor([len(text.split()) for text in texts])
        row["copies"], row["copies_se"] = likelihood.mean(copies)
        row["words"], row["words_se"] = likelihood.mean(words)
        return {**row, "examples": texts[:SHOWN]}

    rows = {"real": row_of(real)}
    for decoding, options in DECODINGS.items():
        for name, prior in {"prior": None, **priors}.items():
            torch.manual_seed(args.seed)
            texts = vae.sample(args.samples, prior=prior, seed=args.seed, **options)
            rows[f"{name}, {decoding}"] = {**row_of(texts), **fits.get(name, {})}
        torch.manual_seed(args.seed)
        lines = draw_sentences(args.train_file, "text", args.samples, args.seed)
        drawn = vae.posterior_stream(lines, seed=args.seed, **options)
        rows[f"aggregate, {decoding}"] = row_of([text for _, text in drawn])
    return {
        "model": args.model_dir,
        "language_model": args.language_model_dir,
        "draws": {name: len(part) for name, part in draws._asdict().items()},
        "samples": args.samples,
        "test_sentences": len(others),
        "components": len(priors["gmm"].weights),
        "seed": args.seed,
        "rows": rows,
    }


def report(results: dict[str, Any]) -> str:
    """The results for people."""
    rows = results["rows"]
    columns = {"source": list(rows)}
    for name in ("gain", "ppl", "reverse_ppl", "self_bleu", "copies", "words"):
        columns[name] = [
            f"{number(row[name])} ± {error(row[name], row[f'{name}_se'])}" if name in row else "-"
            for row in rows.values()
        ]
    lines = [markdown(columns, set(columns) - {"source"}), ""]
    lines.append(
        f"{results['samples']:,} sentences per source; n-grams are tested on "
        f"{results['test_sentences']:,} test sentences; the gmm has "
        f"{results['components']} components; draws: {results['draws']}."
    )
    if blank := {name: row["blank"] for name, row in rows.items() if row["blank"]}:
        lines.append(f"Blank outputs, which have no perplexity: {blank}.")
    for name, row in rows.items():
        lines += ["", f"    {name}", *(f"        {text}" for text in row["examples"])]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("language_model_dir")
    for name in ("train_file", "test_file"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--samples", type=int, default=1000, help="sentences of each source")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    run(parser, args, measure, report)


if __name__ == "__main__":
    main()
