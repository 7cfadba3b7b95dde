"""How sparse the latents of finished runs are, and how well a label is read from them.

    python tests/benchmarks/sparse.py RUN_DIR... --train_file F --train_labels L
        --test_file F --test_labels L [--sentences 5000] [--output results.json]

Runs whose names differ only in a last `_sN` are one row: mean ± standard deviation over
them. The columns:

- hoyer, hoyer_draws: average Hoyer sparsity of the posterior's point, and of one draw per
  sentence, each dimension divided by its standard deviation over the sentences first;
- hoyer_raw, hoyer_draws_raw: the same without this division;
- units_used: sum over the dimensions of the probability of the slab, mean over sentences
  (spike_slab);
- var_spike: variance over the sentences of the probability of the spike, mean over the
  dimensions (spike_slab). Near 0, all sentences have the same zeros;
- rec, kl, rec_shuffled-rec, au: of the run's own final evaluation (metrics.json);
- probe, probe_draws: accuracy on test sentences of a logistic regression on the point, and
  on the draws, of training sentences;
- majority: accuracy of the training sentences' commonest label.

All dimensions are used, active or not.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.labelled import Labelled, longest, read, tokens

from dsvae import pretrained
from dsvae.data.noise import LATENT, normal
from dsvae.errors import UserError
from dsvae.files import write_json
from dsvae.inference.passes import Passes
from dsvae.metrics.catalog import differences
from dsvae.metrics.codes import average_hoyer, hoyer
from dsvae.modeling.families import Distribution
from dsvae.modeling.t5_vae import T5VAE
from dsvae.parallel.world import World
from dsvae.reports.table import error, markdown, number
from dsvae.run_directory import RunDirectory

FROM_THE_RUN = ("rec", "kl", "rec_shuffled-rec", "au")
COLUMNS = (
    *("hoyer", "hoyer_draws", "hoyer_raw", "hoyer_draws_raw", "units_used", "var_spike"),
    *FROM_THE_RUN,
    *("probe", "probe_draws", "majority"),
)
BUDGET = 16_384
WORLD = World(0, 0, 1, torch.device("cpu"))


def sparsity(posterior: Distribution, draws: Tensor) -> dict[str, float]:
    """The sparsity of N posteriors and of one draw of each, (N, Z), by column."""
    found = {
        "hoyer": average_hoyer(posterior.point),
        "hoyer_draws": average_hoyer(draws),
        "hoyer_raw": float(hoyer(posterior.point).nanmean()),
        "hoyer_draws_raw": float(hoyer(draws).nanmean()),
    }
    spike = posterior.tensors().get("spike")
    if spike is not None:
        found["units_used"] = float((1 - spike.double()).sum(1).mean())
        found["var_spike"] = float(spike.double().var(0).mean())
    return found


def accuracy(train: tuple[Tensor, Any], test: tuple[Tensor, Any]) -> float:
    """Of a logistic regression on standardized features (N, Z) that reads labels (N,)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(train[0].double().numpy(), train[1]).score(test[0].numpy(), test[1]))


def encode(model: T5VAE, tokenizer: Any, sentences: Labelled) -> tuple[Distribution, Tensor, Any]:
    """The posteriors of sentences, a draw of each, and their labels."""
    split, kept = tokens(sentences, tokenizer, longest(model))
    posterior = Passes(model, WORLD, token_budget=BUDGET).encode(split).posterior
    keys = [(0, key) for key in split.content_keys.tolist()]
    noise = normal(0, LATENT, keys, model.family.noise_width)
    return posterior, posterior.sample(torch.from_numpy(noise)), kept.labels


def measure(directory: Path, train: Labelled, test: Labelled) -> dict[str, float]:
    """The numbers of one run, by column."""
    paths = RunDirectory(directory)
    model, tokenizer = pretrained.load(paths.model)
    if not (model.config.latent_dim and model.family.continuous):
        raise UserError(f"{directory}: only latents of real numbers can be sparse in this sense")
    final = json.loads(paths.metrics.read_bytes())["test"]
    final |= differences(final)
    posterior, draws, labels = encode(model, tokenizer, test)
    others, other_draws, other_labels = encode(model, tokenizer, train)
    names, counts = np.unique(other_labels, return_counts=True)
    return {
        **sparsity(posterior, draws),
        **{name: final[name] for name in FROM_THE_RUN if final.get(name) is not None},
        "probe": accuracy((others.point, other_labels), (posterior.point, labels)),
        "probe_draws": accuracy((other_draws, other_labels), (draws, labels)),
        "majority": float((labels == names[counts.argmax()]).mean()),
    }


def by_name(runs: dict[str, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """The numbers of runs NAME_s0, NAME_s1, ... under NAME."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run, found in runs.items():
        groups.setdefault(re.sub(r"_s\d+$", "", run), []).append(found)
    return groups


def table(runs: dict[str, dict[str, float]], names: Sequence[str] = COLUMNS) -> str:
    """The columns `names` of runs as Markdown, runs of one name in one row."""
    groups = by_name(runs)
    columns = {"runs": list(groups), "number": [str(len(group)) for group in groups.values()]}
    for name in names:
        columns[name] = []
        for group in groups.values():
            values = [float(found.get(name, math.nan)) for found in group]
            mean = statistics.fmean(values)
            if math.isnan(mean):
                columns[name].append("-")
                continue
            deviation = f" ± {error(mean, statistics.stdev(values))}" if len(values) > 1 else ""
            columns[name].append(number(mean) + deviation)
    return markdown(columns, {"number", *names})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of runs")
    for name in ("train_file", "train_labels", "test_file", "test_labels"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--sentences", type=int, default=5000, help="training and test, each")
    parser.add_argument("--output", help="JSON file to write")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        train = read(args.train_file, args.train_labels).draw(args.sentences, 0)
        test = read(args.test_file, args.test_labels).draw(args.sentences, 0)
        directories = {run.resolve().name: run for run in args.runs}
        if len(directories) < len(args.runs):
            raise UserError("two directories have the same name: the rows are called by it")
        runs = {name: measure(run, train, test) for name, run in directories.items()}
    except (UserError, OSError) as problem:
        parser.error(str(problem))
    if args.output:
        write_json(Path(args.output), runs)
    print(table(runs))
    print(f"\n{len(train):,} training and {len(test):,} test sentences.")


if __name__ == "__main__":
    main()
