"""Trains a sentence VAE and its language model on Penn Treebank, and measures both.

    python tests/benchmarks/ptb.py DIR --output results.json

DIR has ptb.train.txt, ptb.valid.txt and ptb.test.txt, or train.txt and so on: one sentence
per line, words between spaces, rare words as <unk>. The text is taken as it is. The models
read pieces of words, but they spell every text, so the sum over the pieces of a sentence is
the NLL of its words, and not less than with a vocabulary of these words alone.

Both models are those of --config (the recipe ptb): the VAE, and the same decoder with
--injection none. Of each, the checkpoint with the smallest loss on validation text is
measured on all test sentences, in float32. A run that is finished is not repeated. Further
arguments are those of dsvae/train.py, for both: --phase2.steps 8000 --precision fp32.

- nll: -log p of a sentence in nats, the mean, its end included. The importance-weighted
  bound of --draws samples for the VAE (Burda et al. 2016), exact for the language model.
- word ppl: exp(sum of nll / (words + ends)).
- rec + kl: the other bound, of one sample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.command import Results, run

from dsvae import pretrained
from dsvae.data.readers import read_file
from dsvae.data.record_tokens import tokenize
from dsvae.errors import UserError
from dsvae.export import export_checkpoint
from dsvae.inference.passes import Passes
from dsvae.metrics.evaluate import evaluate
from dsvae.reports.table import error, markdown, number
from dsvae.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
MODELS = {
    "vae": (),
    "language model": (
        *("--injection", "none", "--phase2.beta.kind", "constant"),
        *("--phase2.beta.target", "none"),
    ),
}
"""Arguments of dsvae/train.py by model."""


def files_of(directory: Path) -> dict[str, Path]:
    """The file of each split."""
    files = {}
    for split in ("train", "valid", "test"):
        names = [directory / f"{before}{split}.txt" for before in ("ptb.", "")]
        found = [path for path in names if path.is_file()]
        if not found:
            raise UserError(f"{names[0]}: no such file, and no {names[1].name} beside it")
        files[split] = found[0]
    return files


def train(arguments: list[str]) -> None:
    """Runs dsvae/train.py, unless its run is finished."""
    subprocess.run([sys.executable, str(ROOT / "dsvae" / "train.py"), *arguments], check=True)


def best_model(directory: Path) -> Path:
    """The best checkpoint of a run as a model directory."""
    exports = RunDirectory(directory).exports / "best"
    if not exports.is_dir():
        export_checkpoint(directory, "best", exports, print)
    return exports


def row_of(model_dir: Path, test_file: Path, draws: int, batch_tokens: int) -> Results:
    """The numbers of a model on the test sentences."""
    model, tokenizer = pretrained.load(model_dir)
    most, where = model.config.max_tokens, str(test_file)
    split, _, counts = tokenize(read_file(test_file, "DIR", "text"), tokenizer, most, where)
    if counts["truncated"] or counts["unk"]:
        raise UserError(
            f"{test_file}: {counts['truncated']} sentences over {most} tokens, {counts['unk']} "
            f"unknown tokens: give a larger --max_tokens, or another tokenizer"
        )
    latent = model.config.has_latent
    metrics, _ = evaluate(
        Passes(model, token_budget=batch_tokens),
        split,
        samples=1,
        iw_samples=draws if latent else None,
    )
    names = ("nll_iw", "ppl_word_iw") if latent else ("rec", "ppl_word")
    row = {name: metrics[name] for name in ("rec", "kl", "mi", "au", "sentences", "words")}
    row |= {"nll": metrics[names[0]], "ppl_word": metrics[names[1]]}
    row["se"] = {"nll": metrics["se"][names[0]], "ppl_word": metrics["se"][names[1]]}
    parameters = sum(each.numel() for each in model.parameters())
    return {**row, "parameters": parameters, "warnings": metrics["warnings"]}


def measure(args: argparse.Namespace) -> Results:
    files = files_of(args.directory)
    rows: Results = {}
    for name, arguments in MODELS.items():
        directory = args.runs / name.replace(" ", "_")
        given = [f"--{split}_file={path}" for split, path in files.items()]
        given += ["--config", args.config, "--ds_config", args.ds_config]
        train([*given, f"--output_dir={directory}", *arguments, *args.more])
        rows[name] = row_of(best_model(directory), files["test"], args.draws, args.batch_tokens)
    return {"draws": args.draws, "arguments": args.more, "rows": rows}


def report(results: Results) -> str:
    rows: dict[str, dict[str, Any]] = results["rows"]

    def cells(name: str) -> list[str]:
        return [
            f"{number(row[name])} ± {error(row[name], row['se'][name])}" for row in rows.values()
        ]

    columns = {
        "model": list(rows),
        "parameters": [number(row["parameters"]) for row in rows.values()],
        "nll": cells("nll"),
        "word ppl": cells("ppl_word"),
        "rec + kl": [number(row["rec"] + (row["kl"] or 0.0)) for row in rows.values()],
        "kl": [number(row["kl"]) for row in rows.values()],
        "mi": [number(row["mi"]) for row in rows.values()],
        "au": [number(row["au"]) for row in rows.values()],
    }
    first = next(iter(rows.values()))
    lines = [
        f"{first['sentences']:,} test sentences, {first['words']:,} words and as many ends as "
        f"sentences; {results['draws']} draws",
        "",
        markdown(columns, set(columns) - {"model"}),
    ]
    warnings = [f"{name}: {each}" for name, row in rows.items() for each in row["warnings"]]
    return "\n".join(lines + [f"\nwarning: {each}" for each in warnings])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--config", default="ptb")
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "zero1.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ptb"))
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--batch_tokens", type=int, default=16384)
    parser.add_argument("--output", help="JSON file to write")
    args, args.more = parser.parse_known_args(argv)
    run(parser, args, measure, report)


if __name__ == "__main__":
    main()
