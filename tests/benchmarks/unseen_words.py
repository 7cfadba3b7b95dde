"""Writes a tagged corpus in which no sentence with one of four occupations is labelled.

    python tests/benchmarks/unseen_words.py DIRECTORY [-n 20000] [--labelled 200]

train.jsonl: sentences of `dsvae corpus --kind tagged`, of which the first `labelled` without
a held-out occupation have their label and tags. The others are text alone, so a model that
reads them sees the held-out words, and never as occupations. valid.jsonl and test.jsonl
(seeds 1 and 2) are labelled, and each of their sentences has a held-out occupation. An
occupation is found there only if the model has learned that it is used like the others; but
the other eight subjects, which are no occupations, are used alike, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsvae.data.grammar import FACTORS
from dsvae.data.grammar_variants import OCCUPATIONS, Variant, tagged

HELD_OUT = OCCUPATIONS[::2]


def held_out(variant: Variant) -> bool:
    """Whether the subject of a sentence is a held-out occupation."""
    factors = dict(zip(FACTORS, variant.factors, strict=True))
    return FACTORS["subject"][factors["subject"]] in HELD_OUT


def training(size: int, labelled: int) -> Iterator[dict[str, Any]]:
    """The records of train.jsonl."""
    for variant in tagged(size, 0):
        if labelled and not held_out(variant):
            labelled -= 1
            yield variant.record
        else:
            yield variant.record | {"label": None, "tags": None}


def main(argv: list[str] | None = None) -> int:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("-n", type=int, default=20000)
    parser.add_argument("--labelled", type=int, default=200)
    options = parser.parse_args(argv)
    options.directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "train": training(options.n, options.labelled),
        "valid": (each.record for each in tagged(4000, 1) if held_out(each)),
        "test": (each.record for each in tagged(8000, 2) if held_out(each)),
    }
    for name, records in files.items():
        with (options.directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
