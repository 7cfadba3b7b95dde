"""Clusters of relations: how well those of models, and those of the pair of entities alone,
agree with the true relations.

    python tests/benchmarks/relations.py [MODEL_DIR ...] [--sentences 5000] [--seed 1]

The sentences are those of `dsvae corpus --kind relations` with this seed. The training
corpus has seed 0. A model with a cluster head gives its most probable cluster, and one with
categories and no cluster head gives its most probable code. The rows without a model:

- one cluster; random: eight clusters of equal probability;
- k-means of the pair: eight clusters of the one-hot vectors of both entities;
- best guess from the pair: the most probable relation, from the true probabilities. It is
  the most that a clustering of pairs can say of the relation.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from transformers import AutoTokenizer

from dsvae import T5VAE
from dsvae.data import grammar_variants
from dsvae.data.grammar import FACTORS
from dsvae.data.grammar_variants import RELATIONS
from dsvae.metrics.clustering import agreement

_CASES = 160
"""The equally likely cases of `grammar_variants.entity`."""


def pairs_of(records: list[dict[str, Any]]) -> NDArray[np.int64]:
    """(N, 2), the two entities of each record as numbers."""
    places = [{name: i for i, name in enumerate(FACTORS[kind])} for kind in ("subject", "object")]
    texts = (record["text"].split(" | ") for record in records)
    return np.array([[place[name] for place, name in zip(places, t, strict=True)] for t in texts])


def best_guess(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,), the most probable relation of each pair."""
    counts = np.array(
        [
            np.bincount([grammar_variants.entity(r, case) for case in range(_CASES)])
            for r in range(RELATIONS)
        ]
    )
    return np.asarray((counts[:, pairs[:, 0]] * counts[:, pairs[:, 1]]).argmax(0))


def without_model(pairs: NDArray[np.int64], seed: int) -> dict[str, NDArray[np.int64]]:
    """The clusters of the rows without a model, (N,) each."""
    one_hot = np.concatenate([np.eye(2 * RELATIONS)[pairs[:, i]] for i in range(2)], axis=1)
    kmeans = KMeans(RELATIONS, n_init=10, random_state=seed)
    return {
        "one cluster": np.zeros(len(pairs), dtype=np.int64),
        "random": np.random.default_rng(seed).integers(0, RELATIONS, len(pairs)),
        "k-means of the pair": kmeans.fit_predict(one_hot),
        "best guess from the pair": best_guess(pairs),
    }


@torch.no_grad()
def of_model(directory: str, texts: list[str]) -> NDArray[np.int64]:
    """The cluster of each text, (N,): of the cluster head, or the code."""
    model = T5VAE.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for start in range(0, len(texts), 500):
        batch = tokenizer(texts[start : start + 500], padding=True, return_tensors="pt")
        out = model(batch.input_ids, batch.attention_mask, encode_only=True)
        if out.clusters is not None:
            found.append(out.clusters.argmax(-1).numpy())
            continue
        digits = out.posterior.tensors()["probabilities"].argmax(-1).numpy()  # (B, D)
        found.append(digits @ (model.config.categories ** np.arange(digits.shape[1])))
    return np.concatenate(found)


def main(argv: list[str] | None = None) -> int:
    """Prints a table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL_DIR")
    parser.add_argument("--sentences", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1, help="of the sentences")
    options = parser.parse_args(argv)
    drawn = grammar_variants.relations(options.sentences, options.seed)
    records = [variant.record for variant in drawn]
    labels = np.array([record["label"] for record in records])
    rows = without_model(pairs_of(records), options.seed)
    for directory in options.models:
        rows[directory] = of_model(directory, [record["condition"] for record in records])
    columns = ("b3_precision", "b3_recall", "b3_f1", "v_measure", "ari")
    print(f"| clusters of | {' | '.join(columns)} | clusters |")
    print("|---" * (len(columns) + 2) + "|")
    for name, clusters in rows.items():
        scores = agreement(labels, clusters)
        numbers = " | ".join(f"{scores[column]:.3f}" for column in columns)
        print(f"| {name} | {numbers} | {len(np.unique(clusters))} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
