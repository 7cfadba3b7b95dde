"""Analogies of sentences, and the sentences between two sentences.

    python tests/benchmarks/analogies.py MODEL_DIR LANGUAGE_MODEL_DIR
        --train_file F --train_labels L --test_file F --test_labels L
        [--sentences 1000] [--pairs 1 4 16 64] [--steps 7] [--output results.json]

For two labels and a continuous latent. All decoding is greedy, from the point of the
posterior.

Analogies: every test sentence c goes toward the other label by z(c) + z(a) - z(b). a are
training sentences that have the target label, b those that have the label of c: the mean of
so many random pairs, drawn for each c. The rows:

- N pairs: the analogy;
- N pairs, any label: the same with any a and b;
- reconstruction, copy, random: as in style_transfer.py, which has the columns too.

Paths: from each test sentence to another one. The rows:

- linear, slerp: paths between the points of the two;
- copy: the first sentence at all places;
- switch: the first one up to the middle, then the second;
- random: a random test sentence at every place.

The columns of paths:

- ppl: perplexity per token by the language model of the places between the two ends;
- distinct: different texts of a path / places;
- repeated: share of the steps along a path that change nothing;
- step bleu: sentence BLEU of each text with the one before it, where they differ.

For every place there are ppl, and the corpus BLEU with both sentences (`bleu_a`, `bleu_b`)
and with the texts at both ends of the path (`bleu_first`, `bleu_last`).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import style_transfer
from benchmarks.command import run
from benchmarks.style_transfer import Given

from dsvae.errors import UserError
from dsvae.generation import geometry
from dsvae.generation.options import PathKind
from dsvae.metrics import likelihood
from dsvae.metrics.diversity import bleu
from dsvae.reports.table import error, markdown, number

SHOWN = 5


def analogies(
    given: Given, point: Tensor, numbers: list[int], train_sentences: int, seed: int
) -> dict[str, Tensor]:
    """z(c) + mean (z(a) - z(b)) of N sentences c, (N, Z), by the name of the row.

    Args:
        point: (N, Z), z(c).
        numbers: of pairs.
        train_sentences: that a and b are drawn from.
    """
    pool = given.train.draw(train_sentences, seed)
    points = given.vae.encode(pool.texts).point
    rng = np.random.default_rng(seed)
    places = {label: np.flatnonzero(pool.labels == label) for label in np.unique(pool.labels)}

    def drawn(labels: NDArray[np.str_], count: int) -> Tensor:
        return mean([rng.choice(places[label], count) for label in labels])

    def mean(chosen: list[NDArray[np.int64]]) -> Tensor:
        return points[torch.from_numpy(np.stack(chosen))].mean(1)

    rows = {}
    for count in numbers:
        pairs = f"{count} pair{'s' if count > 1 else ''}"
        rows[pairs] = geometry.analogy(
            drawn(given.chosen.labels, count), drawn(given.targets, count), point
        )
        one, other = (mean(list(rng.integers(len(pool), size=(len(point), count)))) for _ in "ab")
        rows[f"{pairs}, any label"] = geometry.analogy(one, other, point)
    return rows


def paths(given: Given, point: Tensor, steps: int, seed: int) -> dict[str, list[list[str]]]:
    """The texts at `steps` places from each of N sentences to the next one (the last goes
    to the first), by the name of the row."""
    texts = given.chosen.texts
    ends = list(zip(texts, [*texts[1:], texts[0]], strict=True))
    rows = {}
    for kind in get_args(PathKind):
        latent = [
            geometry.interpolate(a, b, steps, kind)
            for a, b in zip(point, point.roll(-1, 0), strict=True)
        ]
        decoded = given.vae.decode(torch.cat(latent))
        rows[kind] = [decoded[i : i + steps] for i in range(0, len(decoded), steps)]
    rng = np.random.default_rng(seed)
    others = rng.integers(len(given.test), size=(len(texts), steps)).tolist()
    return {
        **rows,
        "copy": [[a] * steps for a, _ in ends],
        "switch": [[a] * math.ceil(steps / 2) + [b] * (steps // 2) for a, b in ends],
        "random": [[given.test.texts[i] for i in row] for row in others],
    }


def score(rows: list[list[str]], texts: list[str], language_model: Any) -> dict[str, Any]:
    """The numbers of one row of paths.

    Args:
        rows: of each of N paths, the text of each of K places.
        texts: N sentences. Path i is meant to lead from sentence i to the next one.
    """
    steps = len(rows[0])
    others = [*texts[1:], texts[0]]
    neighbours = [list(zip(row, row[1:], strict=False)) for row in rows]
    found = {
        "distinct": [len(set(row)) / steps for row in rows],
        "repeated": [float(np.mean([a == b for a, b in pairs])) for pairs in neighbours],
        "step bleu": [
            float(np.mean(scores))
            for pairs in neighbours
            if (scores := [bleu(b, [a]) for a, b in pairs if a != b])
        ],
    }
    result: dict[str, Any] = {}
    for name, values in found.items():
        numbers = torch.tensor(values or [math.nan], dtype=torch.float64)
        result[name], result[f"{name}_se"] = likelihood.mean(numbers)
    middle = [text for row in rows for text in row[1:-1]]
    result |= style_transfer.perplexity(*language_model, middle)

    def corpus(place: int, references: list[str]) -> float:
        # `force` silences a warning about text that is already tokenized.
        own = [row[place] for row in rows]
        return BLEU(force=True).corpus_score(own, [references]).score

    result["places"] = [
        {
            "t": place / (steps - 1),
            **style_transfer.perplexity(*language_model, [row[place] for row in rows]),
            "bleu_a": corpus(place, texts),
            "bleu_b": corpus(place, others),
            "bleu_first": corpus(place, [row[0] for row in rows]),
            "bleu_last": corpus(place, [row[-1] for row in rows]),
        }
        for place in range(steps)
    ]
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All results, as in the JSON file."""
    given = style_transfer.load(args)
    if not given.vae.model.family.continuous:
        raise UserError(f"{args.model_dir} has categories, which cannot be added: give another")
    chosen, language_model = given.chosen, given.language_model
    point = style_transfer.passes(given.vae.model).encode(given.split).posterior.point
    moved = analogies(given, point, args.pairs, args.train_sentences, args.seed)
    reconstructions = given.vae.decode(point)
    texts = {name: given.vae.decode(latent) for name, latent in moved.items()}
    texts |= {"reconstruction": reconstructions, "copy": chosen.texts}
    texts |= style_transfer.random_sentences(given.test, chosen.texts, given.targets, args.seed)
    classifier = style_transfer.train_classifier(given.train)
    rest = (chosen.texts, reconstructions, given.targets, classifier, language_model)
    between = paths(given, point, args.steps, args.seed)
    return {
        "model": args.model_dir,
        "language_model": args.language_model_dir,
        "sentences": len(chosen),
        "steps": args.steps,
        "seed": args.seed,
        "moved": {
            name: float((latent - point).norm(dim=1).mean()) for name, latent in moved.items()
        },
        "analogies": {name: style_transfer.score(each, *rest) for name, each in texts.items()},
        "paths": {
            name: score(rows, chosen.texts, language_model) for name, rows in between.items()
        },
        "examples": [
            {
                "sentence": chosen.texts[i],
                "next": chosen.texts[(i + 1) % len(chosen)],
                "target": str(given.targets[i]),
                **{name: texts[name][i] for name in (*moved, "reconstruction")},
                "path": between["linear"][i],
            }
            for i in range(min(SHOWN, len(chosen)))
        ],
    }


def report(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [style_transfer.table(results["analogies"]), ""]
    lines.append(f"{results['sentences']:,} test sentences. Mean length of the move:")
    lines += [f"    {name:<24} {number(length)}" for name, length in results["moved"].items()]
    rows = results["paths"]
    columns = {"path": list(rows)}
    for name in ("ppl", "distinct", "repeated", "step bleu"):
        columns[name] = [
            f"{number(row[name])} ± {error(row[name], row[f'{name}_se'])}" for row in rows.values()
        ]
    lines += ["", markdown(columns, set(columns) - {"path"}), ""]
    places = [(name, place) for name, row in rows.items() for place in row["places"]]
    columns = {"path": [name for name, _ in places]}
    for name in ("t", "ppl", "bleu_a", "bleu_b", "bleu_first", "bleu_last"):
        columns[name] = [number(place[name]) for _, place in places]
    lines.append(markdown(columns, set(columns) - {"path"}))
    for example in results["examples"]:
        lines += ["", f"    toward {example['target']}: {example['sentence']}"]
        shown = [name for name in example if name in results["moved"] or name == "reconstruction"]
        lines += [f"        {name:<24} {example[name]}" for name in shown]
        lines.append(f"    to: {example['next']}")
        lines += [f"        {text}" for text in example["path"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = style_transfer.arguments(__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=7, help="places of a path, its ends included")
    parser.add_argument(
        "--train_sentences", type=int, default=20_000, help="that pairs are drawn from"
    )
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error("--steps: give at least 3, so that there is a place between the ends")
    run(parser, args, measure, report)


if __name__ == "__main__":
    main()
