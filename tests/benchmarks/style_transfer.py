"""Style transfer through z: how often the label changes, and what else changes with it.

    python tests/benchmarks/style_transfer.py MODEL_DIR LANGUAGE_MODEL_DIR
        --train_file F --train_labels L --test_file F --test_labels L
        [--sentences 1000] [--output results.json]

For two labels. A categorical latent: one variable is set. It is the one that has the most
mutual information with the label over training sentences. For each label it gets the value
with the highest P(label|value), and of equal ones the most frequent, among the values that
at least 1% of these sentences have (`LEAST`). A continuous latent: z moves along the
attribute vector of the label. All decoding is greedy, from the point of the posterior.

Every sentence goes toward the other label. The rows of the table:

- transfer: one variable set, or one row per strength of the move;
- reconstruction: nothing set;
- copy: the sentence itself;
- random, target label: a random test sentence that has the target label;
- random, any label: a random other test sentence.

The columns:

- accuracy: share that an outside classifier takes for the target label. It is a logistic
  regression on TF-IDF of words and pairs of words, trained on all training sentences;
- bleu: corpus BLEU with the source (sacrebleu);
- ppl: perplexity per token of a language model (trained with --injection none);
- gm: geometric mean of 100 accuracy, bleu and 100 / ppl;
- unchanged: share that is the same text as the reconstruction.

Standard errors are over sentences.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mutual_info_score
from sklearn.pipeline import Pipeline, make_pipeline

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.command import run
from benchmarks.labelled import Labelled, longest, read, tokens

from dsvae import pretrained
from dsvae.data.tokenization import TokenizedSplit
from dsvae.errors import UserError
from dsvae.generation import SentenceVAE
from dsvae.inference.passes import Passes
from dsvae.metrics import likelihood
from dsvae.metrics.samples import Reader
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World
from dsvae.reports.table import error, markdown, number

LEAST = 0.01
"""Share of the training sentences that a value must have to be chosen."""
BUDGET = 16_384
SHOWN = 10
WORLD = World(0, 0, 1, torch.device("cpu"))


def choose(codes: NDArray[np.integer], labels: NDArray[np.str_]) -> dict[str, Any]:
    """The variable and the values that stand for the labels.

    Args:
        codes: (N, D), the values of D variables.
        labels: (N,)

    Returns: `variable`; `information`, of every variable and the label in nats; and for
        each label `value`, `share` = P(label|value), and `count`, the sentences that have
        the value.

    Raises:
        UserError: no value of the variable is frequent enough.
    """
    information = [float(mutual_info_score(labels, column)) for column in codes.T]
    variable = int(np.argmax(information))
    column = codes[:, variable]
    values, counts = np.unique(column, return_counts=True)
    frequent = values[counts >= LEAST * len(column)]
    if not len(frequent):
        raise UserError(f"variable {variable}: no value has {LEAST:.0%} of the sentences")
    chosen = {}
    for label in np.unique(labels).tolist():
        share, count, value = max(
            (float((labels[has] == label).mean()), int(has.sum()), int(value))
            for value, has in ((value, column == value) for value in frequent)
        )
        chosen[label] = {"value": value, "share": share, "count": count}
    return {"variable": variable, "information": information, "labels": chosen}


def transfers(
    vae: SentenceVAE,
    train: Labelled,
    point: torch.Tensor,
    targets: NDArray[np.str_],
    strengths: list[float],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """z of every way to move N sentences toward their targets, by the name of the row;
    and what was chosen.

    Args:
        train: the sentences that decide how.
        point: (N, Z), the sentences as they are.
        targets: (N,), labels.
        strengths: of the moves of a continuous latent.
    """
    family = vae.model.family
    if family.continuous:
        one, other = np.unique(train.labels).tolist()
        toward = vae.attribute_vector(train.texts, train.labels.tolist(), other)
        sign = torch.tensor([1.0 if target == other else -1.0 for target in targets])
        rows = {
            f"direction, strength {strength:g}": point + strength * sign[:, None] * toward
            for strength in strengths
        }
        return rows, {"length_of_direction": float(toward.norm()), "toward": other, "from": one}
    split, kept = tokens(train, vae.tokenizer, vae.inputs.max_tokens)
    found = passes(vae.model).encode(split).posterior.point
    codes = found.view(len(found), family.units, -1).argmax(-1).numpy()
    chosen = choose(codes, kept.labels)
    unit = chosen["variable"]
    moved = [
        vae.with_categories(z[None], {unit: chosen["labels"][target]["value"]})
        for z, target in zip(point, targets, strict=True)
    ]
    return {"transfer": torch.cat(moved)}, chosen


def random_sentences(
    pool: Labelled, sources: list[str], targets: NDArray[np.str_], seed: int
) -> dict[str, list[str]]:
    """For each of N sentences a random one that has its target label, and a random one
    that has any label, of another text."""
    if len(set(pool.texts)) < 2:
        raise UserError("all test sentences are the same: give different ones")
    rng = np.random.default_rng(seed)
    places = {label: np.flatnonzero(pool.labels == label) for label in np.unique(targets)}
    rows: dict[str, list[str]] = {"random, target label": [], "random, any label": []}
    for source, target in zip(sources, targets, strict=True):
        rows["random, target label"].append(pool.texts[rng.choice(places[target])])
        while (other := pool.texts[rng.integers(len(pool))]) == source:
            pass
        rows["random, any label"].append(other)
    return rows


def train_classifier(train: Labelled) -> Pipeline:
    """Logistic regression on TF-IDF of whitespace words and pairs of them."""
    # The pattern keeps "n't" and punctuation, which scikit-learn's own drops.
    features = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", min_df=2)
    return make_pipeline(features, LogisticRegression(max_iter=1000)).fit(train.texts, train.labels)


def passes(model: T5VAE) -> Passes:
    """Passes with progress bars."""
    return Passes(model, WORLD, token_budget=BUDGET)


def perplexity(model: T5VAE, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """`ppl`, per token, and its standard error, of the sentences that are not blank, by a
    language model; `blank` and `unk`, the blank ones and the unknown tokens."""
    found = Reader(passes(model), tokenizer).read(texts)[0]
    errors, ppl = found.pop("se"), found.pop("generative_ppl")
    return {"ppl": ppl, "ppl_se": errors["generative_ppl"], **found}


def score(
    texts: list[str],
    sources: list[str],
    reconstructions: list[str],
    targets: NDArray[np.str_],
    classifier: Pipeline,
    language_model: tuple[T5VAE, Any],
) -> dict[str, Any]:
    """The numbers of one row, by name."""
    right = torch.from_numpy(classifier.predict(texts) == targets)
    accuracy, accuracy_se = likelihood.mean(right)
    # `force` silences a warning about text that is already tokenized.
    bleu = BLEU(force=True).corpus_score(texts, [sources]).score
    fluency = perplexity(*language_model, texts)
    parts = (100 * accuracy, bleu, 100 / fluency["ppl"])
    same = torch.tensor([a == b for a, b in zip(texts, reconstructions, strict=True)])
    unchanged, unchanged_se = likelihood.mean(same)
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "accuracy_toward": {
            label: float(right[torch.from_numpy(targets == label)].double().mean())
            for label in np.unique(targets).tolist()
        },
        "bleu": bleu,
        **fluency,
        "gm": math.prod(parts) ** (1 / 3),
        "unchanged": unchanged,
        "unchanged_se": unchanged_se,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def with_error(row: dict[str, Any], name: str) -> str:
        return f"{number(row[name])} ± {error(row[name], row[f'{name}_se'])}"

    columns = {"row": list(rows)}
    for name in ("accuracy", "bleu", "ppl", "gm", "unchanged"):
        columns[name] = [
            with_error(row, name) if f"{name}_se" in row else number(row[name])
            for row in rows.values()
        ]
    return markdown(columns, set(columns) - {"row"})


@dataclass(frozen=True)
class Given:
    """What the arguments name."""

    vae: SentenceVAE
    language_model: tuple[T5VAE, Any]
    train: Labelled
    test: Labelled
    chosen: Labelled
    """The test sentences that are changed."""
    split: TokenizedSplit
    """Their tokens."""
    targets: NDArray[np.str_]
    """The other label of each."""


def load(args: argparse.Namespace) -> Given:
    """Raises UserError where the labels or the language model do not fit."""
    train = read(args.train_file, args.train_labels)
    test = read(args.test_file, args.test_labels)
    names = np.unique(train.labels).tolist()
    if len(names) != 2 or not set(test.labels) <= set(names):
        raise UserError(f"the labels are {', '.join(names)}: give two, the same in both files")
    model, tokenizer = pretrained.load(args.model_dir)
    vae = SentenceVAE(model, tokenizer, max_tokens=longest(model))
    language_model = pretrained.load(args.language_model_dir)
    if language_model[0].config.injection != "none":
        raise UserError(f"{args.language_model_dir} has a latent: give a model of injection none")
    split, chosen = tokens(test.draw(args.sentences, args.seed), tokenizer, vae.inputs.max_tokens)
    targets = np.where(chosen.labels == names[0], names[1], names[0])
    return Given(vae, language_model, train, test, chosen, split, targets)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All results, as in the JSON file."""
    given = load(args)
    vae, train, test, chosen = given.vae, given.train, given.test, given.chosen
    targets, language_model = given.targets, given.language_model
    point = passes(vae.model).encode(given.split).posterior.point
    deciding = train.draw(args.train_sentences, args.seed)
    moved, how = transfers(vae, deciding, point, targets, args.strengths)

    reconstructions = vae.decode(point)
    texts = {name: vae.decode(latent) for name, latent in moved.items()}
    texts |= {"reconstruction": reconstructions, "copy": chosen.texts}
    texts |= random_sentences(test, chosen.texts, targets, args.seed)
    classifier = train_classifier(train)
    own = torch.from_numpy(classifier.predict(test.texts) == test.labels)
    rest = (chosen.texts, reconstructions, targets, classifier, language_model)
    return {
        "model": args.model_dir,
        "language_model": args.language_model_dir,
        "family": vae.model.config.family,
        "sentences": len(chosen),
        "train_sentences": len(deciding),
        "seed": args.seed,
        "chosen": how,
        "classifier": dict(
            zip(("accuracy", "accuracy_se"), likelihood.mean(own), strict=True), sentences=len(own)
        ),
        "rows": {name: score(each, *rest) for name, each in texts.items()},
        "examples": [
            {
                "label": str(chosen.labels[i]),
                "target": str(targets[i]),
                **{name: each[i] for name, each in texts.items()},
            }
            for i in range(min(SHOWN, len(chosen)))
        ],
    }


def report(results: dict[str, Any]) -> str:
    """The results for people."""
    chosen, own = results["chosen"], results["classifier"]
    lines = [table(results["rows"]), ""]
    lines.append(
        f"{results['sentences']:,} test sentences toward the other label; "
        f"{results['train_sentences']:,} training sentences decided how."
    )
    if "variable" in chosen:
        unit = chosen["variable"]
        lines.append(
            f"Variable {unit}, with {chosen['information'][unit]:.3f} nats about the label; "
            + "; ".join(
                f"label {label}: value {each['value']}, P(label|value) {each['share']:.3f}, "
                f"{each['count']:,} sentences"
                for label, each in chosen["labels"].items()
            )
            + f" (values of fewer than {LEAST:.0%} of the sentences are left out)."
        )
    else:
        lines.append(f"The attribute vector has length {chosen['length_of_direction']:.3f}.")
    lines.append(
        f"The classifier has an accuracy of {number(own['accuracy'])} ± "
        f"{error(own['accuracy'], own['accuracy_se'])} on {own['sentences']:,} test sentences."
    )
    if blank := {n: row["blank"] for n, row in results["rows"].items() if row["blank"]}:
        lines.append(f"Blank outputs, which have no perplexity: {blank}.")
    for example in results["examples"]:
        lines += ["", f"    {example['label']} -> {example['target']}   {example['copy']}"]
        shown = [n for n in example if n.startswith(("reconstruction", "transfer", "direction"))]
        lines += [f"        {name:<24} {example[name]}" for name in shown]
    return "\n".join(lines)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of what `load` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("language_model_dir")
    for name in ("train_file", "train_labels", "test_file", "test_labels"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--sentences", type=int, default=1000, help="test sentences to change")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--output", help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--train_sentences", type=int, default=20_000, help="that decide what is set"
    )
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    args = parser.parse_args(argv)
    run(parser, args, measure, report)


if __name__ == "__main__":
    main()
