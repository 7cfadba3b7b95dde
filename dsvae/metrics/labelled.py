"""What the heads of a model say of labelled sentences, against their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dsvae.data.tokenization import TokenizedSplit
from dsvae.inference.passes import Encoded
from dsvae.metrics.clustering import of_clusters
from dsvae.metrics.tagging import of_classes, of_entities
from dsvae.modeling.crf import IGNORE


def of_heads(
    encoded: Encoded,
    split: TokenizedSplit,
    classes: Sequence[str],
    tags: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Scores classes, clusters and tags over the sentences that have labels or tags.
    What the model or the split lacks has no score.

    Args:
        classes, tags: the names of the model's heads.
        seed: of the random clusters beside the model's.

    Returns: those of `of_classes`, `agreement` and `of_entities`; `labelled` and
        `tagged`, the sentences with a label and with tags; for clusters also
        `clusters_used`, `label_values` (how many different ones there are), and the
        scores of clusterings that read nothing: `b3_f1_one_cluster`, `b3_f1_random`,
        `v_measure_random`.
    """
    metrics: dict[str, Any] = {"se": {}}
    labels = split.class_labels
    if labels is not None and (labels != IGNORE).any():
        has = labels != IGNORE
        metrics["labelled"] = int(has.sum())
        if encoded.class_logits is not None:
            true, predicted = (
                [classes[i] for i in each]
                for each in (labels[has], _best(encoded.class_logits)[has])
            )
            add(metrics, of_classes(true, predicted))
        if encoded.clusters is not None:
            # The random clusters follow the order of the rows, which must not be that of
            # the file.
            order = np.argsort(split.content_keys)
            order = order[has[order]]
            clusters = _best(encoded.clusters)[order]
            found = of_clusters(labels[order].tolist(), clusters.tolist(), seed)
            one, shuffled = found.pop("one_cluster"), found.pop("random")
            del found["sentences"]
            found["label_values"] = found.pop("classes")
            found["clusters_used"] = found.pop("clusters")
            found["b3_f1_one_cluster"] = one["b3_f1"]
            found["b3_f1_random"] = shuffled["b3_f1"]
            found["v_measure_random"] = shuffled["v_measure"]
            add(metrics, found)
    if encoded.tags is not None:
        rows = split.tags(range(len(split)))
        assert rows is not None  # the pass had them
        pairs = [
            (row[row != IGNORE], found[found != IGNORE])
            for row, found in zip(rows, encoded.tags.numpy(), strict=True)
        ]
        names = [[[tags[i] for i in each] for each in pair] for pair in pairs if len(pair[0])]
        metrics["tagged"] = len(names)
        add(metrics, of_entities([true for true, _ in names], [found for _, found in names]))
    return metrics


def _best(scores: Tensor) -> np.ndarray:
    return scores.argmax(-1).numpy()


def add(metrics: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds metrics, with their standard errors under `se`."""
    metrics["se"] |= more.pop("se")
    if reasons := more.pop("undefined", None):
        metrics["undefined"] = metrics.get("undefined", {}) | reasons
    metrics |= more
