"""What conditional models say to the conditions of a file, and how different it is.

    python tests/benchmarks/conditional.py RUN_DIR... --test_file F.jsonl
        [--condition_column condition] [--text_column text] [--conditions 200] [--draws 10]
        [--labels_of train.jsonl] [--output results.json]

Runs whose names differ only in a last `_sN` are one row: mean ± standard deviation over
them. For each of the first different conditions of the file, z is drawn from the prior
(`--draws` times) and decoded greedily, so only z varies. The columns:

- rec, kl, rec+kl, nll_iw, rec_shuffled-rec, rec_prior: of the run's own final evaluation
  (metrics.json), nats per sentence;
- adherence: share of outputs that are sentences of the built-in grammar with the subject,
  verb and object of their condition. With `--labels_of F`, for conditions that are labels:
  share of outputs whose label is their condition, by a TF-IDF classifier of F's texts;
- triples: different choices of tense, polarity and sentence type among the outputs of one
  condition, mean over conditions;
- distinct_1, distinct_2, self_bleu, bleu_max, bleu_mean: `of_conditions` of
  dsvae/metrics/diversity.py. distinct is of all outputs together, self_bleu within a
  condition, and the references of BLEU are the texts of the condition in the file.

For a file of `dsvae corpus --kind paired`, the row `corpus` has as many fresh texts of the
corpus itself for each condition. Its rec + kl is the mean of -log p(text | condition) of
the whole file, the least that a model can have.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.labelled import Labelled
from benchmarks.sparse import table
from benchmarks.style_transfer import train_classifier

from dsvae import pretrained
from dsvae.data import grammar
from dsvae.data.grammar import FACTORS
from dsvae.data.grammar_variants import DEPENDENT, dependent_value
from dsvae.data.noise import PRIOR, generator
from dsvae.data.readers import read_records
from dsvae.data.records import Columns
from dsvae.data.tokenization import token_ids
from dsvae.errors import UserError
from dsvae.files import write_json
from dsvae.metrics.catalog import differences
from dsvae.metrics.diversity import of_conditions
from dsvae.modeling.t5_vae import T5VAE
from dsvae.run_directory import RunDirectory

COLUMNS = (
    *("rec", "kl", "rec+kl", "nll_iw", "rec_shuffled-rec", "rec_prior"),
    *("adherence", "triples", "distinct_1", "distinct_2", "self_bleu", "bleu_max", "bleu_mean"),
)
CASES = 20
"""Equally likely cases of a dependent factor (`dependent_value`)."""


@torch.no_grad()
def outputs(
    model: T5VAE, tokenizer: Any, conditions: Sequence[str], draws: int, max_tokens: int = 64
) -> list[list[str]]:
    """What the model says to each of C conditions, greedily, for each of its draws of
    z."""
    encoded = [torch.tensor(ids) for ids, _ in token_ids(conditions, tokenizer, max_tokens)]
    ids = pad_sequence(encoded, batch_first=True, padding_value=model.config.pad_token_id)
    lengths = torch.tensor([len(each) for each in encoded])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    prior, width = model.prior(ids, mask), model.family.noise_width
    found: list[list[str]] = [[] for _ in conditions]
    for draw in range(draws):
        rows = [generator(0, PRIOR, draw, i).standard_normal(width) for i in range(len(ids))]
        noise = torch.from_numpy(np.stack(rows)).float()
        generated = model.generate(
            latent=prior.sample(noise),
            condition_ids=ids,
            condition_mask=mask,
            max_new_tokens=max_tokens,
        )
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        for own, text in zip(found, texts, strict=True):
            own.append(text)
    return found


def of_grammar(conditions: Sequence[str], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Adherence, and different triples per condition, of the outputs of each condition."""
    adherent, triples = [], []
    for condition, own in zip(conditions, texts, strict=True):
        parsed = [grammar.parse(text) for text in own]
        adherent += [each is not None and named(each) == condition for each in parsed]
        kinds = ("tense", "polarity", "sentence_type")
        triples.append(len({tuple(each[kind] for kind in kinds) for each in parsed if each}))
    return {"adherence": statistics.fmean(adherent), "triples": statistics.fmean(triples)}


def named(factors: Mapping[str, str]) -> str:
    """The condition of a sentence of the paired corpus."""
    return " ".join(factors[name] for name in ("subject", "verb", "object"))


def paired_nats(condition: str, text: str) -> float:
    """-log p(text | condition) under the paired corpus itself; infinite where it has no
    such text."""
    factors = grammar.parse(text)
    if factors is None or named(factors) != condition:
        return math.inf
    subject = FACTORS["subject"].index(factors["subject"])
    nats = log(len(FACTORS["adjective"]))
    for name in DEPENDENT:
        value = FACTORS[name].index(factors[name])
        cases = sum(dependent_value(name, subject, case) == value for case in range(CASES))
        nats -= log(cases / CASES)
    return nats


def paired_texts(condition: str, draws: int, seed: int) -> list[str]:
    """Texts that the paired corpus has for a condition, drawn from it."""
    rng = np.random.default_rng(seed)
    factors: dict[str, str | int] = dict(
        zip(("subject", "verb", "object"), condition.split(), strict=True)
    )
    subject = FACTORS["subject"].index(str(factors["subject"]))
    return [
        grammar.sentence(
            factors
            | {name: dependent_value(name, subject, int(rng.integers(CASES))) for name in DEPENDENT}
            | {"adjective": int(rng.integers(len(FACTORS["adjective"])))}
        )
        for _ in range(draws)
    ]


def of_labels(
    classifier: Any, conditions: Sequence[str], texts: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Adherence of outputs whose conditions are labels."""
    right = [
        classifier.predict(own) == condition
        for condition, own in zip(conditions, texts, strict=True)
    ]
    return {"adherence": float(np.mean(right))}


def of_texts(
    texts: Sequence[Sequence[str]],
    references: Mapping[str, Sequence[str]],
    classifier: Any = None,
) -> dict[str, float]:
    """The numbers of the texts for each of the conditions of `references`."""
    diversity = of_conditions(texts, list(references.values()))
    conditions = list(references)
    return {
        **(
            of_labels(classifier, conditions, texts)
            if classifier
            else of_grammar(conditions, texts)
        ),
        "self_bleu": diversity["self_bleu_within"],
        **{name: diversity[name] for name in ("distinct_1", "distinct_2", "bleu_max", "bleu_mean")},
    }


def measure(
    directory: Path, references: Mapping[str, Sequence[str]], draws: int, classifier: Any
) -> dict[str, float]:
    """The numbers of one run, by column."""
    paths = RunDirectory(directory)
    model, tokenizer = pretrained.load(paths.model)
    if not model.config.conditional:
        raise UserError(f"{directory}: only a conditional model answers conditions")
    final = json.loads(paths.metrics.read_bytes())["test"]
    final |= differences(final) | {"rec+kl": -final["elbo"]}
    texts = outputs(model, tokenizer, list(references), draws)
    known = {name: final[name] for name in COLUMNS if final.get(name) is not None}
    return known | of_texts(texts, references, classifier)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of runs")
    parser.add_argument("--test_file", required=True, type=Path)
    parser.add_argument("--condition_column", default="condition")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--conditions", type=int, default=200, help="the first ones of the file")
    parser.add_argument("--draws", type=int, default=10, help="of z for each condition")
    parser.add_argument("--labels_of", type=Path, help="records to learn the conditions from")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    references: dict[str, list[str]] = {}
    try:
        columns = Columns(args.text_column, args.condition_column)
        records = list(read_records(args.test_file, "--test_file", columns))
        for record in records:
            references.setdefault(str(record.condition), []).append(record.text)
        chosen = dict(list(references.items())[: args.conditions])
        directories = {run.resolve().name: run for run in args.runs}
        if len(directories) < len(args.runs):
            raise UserError("two directories have the same name: the rows are called by it")
        classifier = None
        if args.labels_of:
            known = list(read_records(args.labels_of, "--labels_of", columns))
            labels = np.array([str(record.condition) for record in known])
            classifier = train_classifier(Labelled([record.text for record in known], labels))
        runs = {
            name: measure(run, chosen, args.draws, classifier) for name, run in directories.items()
        }
    except (UserError, OSError) as problem:
        parser.error(str(problem))
    nats = [paired_nats(str(record.condition), record.text) for record in records]
    if all(map(math.isfinite, nats)):
        texts = [paired_texts(each, args.draws, seed) for seed, each in enumerate(chosen)]
        runs["corpus"] = {"rec+kl": statistics.fmean(nats), **of_texts(texts, chosen)}
    print(table(runs, COLUMNS))
    print(f"\n{len(chosen):,} conditions, {args.draws} draws of z each, greedy decoding.")
    if args.output:
        write_json(Path(args.output), runs)


if __name__ == "__main__":
    main()
