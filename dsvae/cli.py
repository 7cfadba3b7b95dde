"""The `dsvae` command: evaluate a trained model, use its latent space, compare and plan
runs.

Results go to stdout, in UTF-8, and nothing else does. Warnings, counts and progress go
to stderr. A mistake of the user is one line on stderr and exit code 2. Results that find
no room on the disk are one line and exit code 74.
"""

# No `from __future__ import annotations`: command_line.py reads the annotations. What
# needs torch is imported inside the commands: help and usage errors should not wait for
# it.

import contextlib
import errno
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Annotated, Any

from dsvae import private_names
from dsvae.command_line import commands, dispatch
from dsvae.config import ALIASES, run_flags
from dsvae.console import (
    abandon_stdout,
    one_line,
    prepare_streams,
    progress,
    say,
    show,
    table,
    terminable,
)
from dsvae.data.grammar_variants import CorpusKind
from dsvae.errors import EXIT_DISK, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunStopped, UserError
from dsvae.generation.options import (
    OPTIONS,
    LatentFormat,
    LatentType,
    PathKind,
    PriorKind,
    Scale,
    SolverKind,
    SourceKind,
)
from dsvae.modeling.settings import Count, Precision, Rule, at_least

SHARED = {
    "model_dir": "model directory of a run (OUTPUT_DIR/model), or a hub id.",
    "file": "sentences (.txt, .jsonl, .csv, .tsv, .parquet); stdin, one per line, if it is left "
    "out or -.",
    "text_column": "column of the sentence, if the file has columns.",
    "condition": "the condition, for a conditional model.",
    "condition_column": "column of the condition of each sentence, for a conditional model.",
    "steps": "steps from noise to z, for --source flow; 50 by default.",
    "solver": "for --source flow: euler (the default), or heun, which takes twice as long and has "
    "a smaller error.",
    "guidance": "for --source flow: how far --label and the condition are followed; 1, the "
    "default: as in the data.",
    "label": "for --source flow: the class of all sentences; by default any.",
    "json": "prints JSON, one object per line.",
    "seed": "repeats the output of --do_sample exactly.",
    "batch_size": "sentences that the model takes at a time.",
    "max_tokens": "longest sentence, and longest condition, in tokens, EOS included. A longer one "
    "of a file is truncated and counted on stderr; a longer one of the command line is an error.",
    "device": "cpu, cuda, cuda:1, ...; by default the accelerator if there is one.",
    "precision": "fp32, tf32 (NVIDIA GPUs: float32 weights, faster products) or bf16. Only fp32 "
    "gives the same outputs on every device.",
    "options": "those of transformers' generate: --do_sample --temperature --top_p --num_beams "
    "--max_new_tokens (128) and more. Without any, the most likely token is taken each time "
    "(greedy).",
}
"""What the help says about parameters that several commands have."""


class Model:
    """The model that a command works with, and the flags that several such commands
    have."""

    def __init__(
        self,
        model_dir: str,
        *,
        file: str | None = None,
        text_column: str = "text",
        condition_column: str | None = None,
        batch_size: int = 128,
        json: bool = False,
        seed: int | None = None,
        max_tokens: int = 512,
        device: str | None = None,
        precision: Precision = "fp32",
        **options: Any,
    ) -> None:
        self.model_dir, self.json, self.options = model_dir, json, options
        self.source = (file, text_column, condition_column)
        self._settings: dict[str, Any] = {"batch_size": batch_size, "options": options}
        self._settings |= {"seed": seed, "max_tokens": max_tokens, "device": device}
        self._settings["precision"] = precision
        self.loading: dict[str, Any] = {
            name: each for name, each in self._settings.items() if name in LOADING
        }

    def open(self, **settings: Any) -> contextlib.AbstractContextManager[tuple[Any, int]]:
        """Returns the loaded model and its seed; `settings` as of `session`."""
        from dsvae.generation.session import session

        return session(self.model_dir, **(self._settings | settings))

    @contextlib.contextmanager
    def read(self) -> Iterator[tuple[Any, Any]]:
        """Yields the loaded model and the records of FILE; a file without a sentence is a
        UserError."""
        from dsvae.generation.reading import read_records
        from dsvae.generation.session import check_not_empty

        records = read_records(*self.source)
        with self.open(conditions=self.source[2] is not None) as (vae, _):
            yield vae, records
            check_not_empty(vae, self.source[0])

    def show(self, rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
        """Prints rows as `console.show` does."""
        show(rows, self.json, line)


LOADS = "max_tokens device precision"
LOADING = ("batch_size", *LOADS.split())
READS = "file text_column condition_column batch_size"
GENERATES = f"json seed {LOADS} options"


def with_model(flags: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that takes a `Model` in place of MODEL_DIR.

    Args:
        flags: the parameters of `Model` that the command has besides its own.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        model_dir, *declared = inspect.signature(Model).parameters.values()
        _, *own = inspect.signature(function).parameters.values()
        shared = {each.name: each for each in declared if each.name in flags.split()}
        words = [model_dir]
        if file := shared.pop("file", None):
            words.append(file.replace(kind=file.POSITIONAL_OR_KEYWORD))
        signature = inspect.Signature([*words, *own, *shared.values()])

        @functools.wraps(function)
        def command(*words: str, **given: Any) -> None:
            values = signature.bind(*words, **given).arguments
            values |= values.pop("options", {})
            mine = {each.name: values.pop(each.name) for each in own if each.name in values}
            function(Model(**values), **mine)

        command.__signature__ = signature  # type: ignore[attr-defined]
        return command

    return decorate


@with_model(f"batch_size {GENERATES}")
def sample(
    model: Model,
    *,
    n: Count = 20,
    condition: str | None = None,
    conditions_file: str | None = None,
    source: SourceKind = "prior",
    steps: Count | None = None,
    solver: SolverKind | None = None,
    guidance: float | None = None,
    label: str | None = None,
    file: str | None = None,
    text_column: str = "text",
    condition_column: str | None = None,
) -> None:
    """Generates sentences from random latents.

    A conditional model needs a condition: one for all sentences, a file of them, or a
    column of --file. Sample i has the same noise under every condition. With --json one
    object per line: "sample" (from 1), "sentence", and "condition" if there is one; for
    a file also "line", the number in it, and with --source aggregate "from", the sentence
    whose posterior was sampled.

    Args:
        n: number of sentences; of --conditions_file, per condition.
        condition: of all sentences, for a conditional model.
        conditions_file: conditions, one per line, or in a column (.jsonl, .csv, .tsv,
            .parquet).
        source: prior draws z from p(z), or p(z|c) of a condition; aggregate draws it from
            q(z|x) of sentences of --file, which the decoder was trained on;
            fitted draws it from what dsvae fit_prior has fitted to such draws; flow draws
            it from the prior that train.py --phase prior has trained.
        file: sentences for --source aggregate (.txt, .jsonl, .csv, .tsv, .parquet).
        condition_column: column of the condition in --file, or in --conditions_file, where
            it is "condition" by default.
        seed: repeats the output exactly; by default a fresh one is drawn and printed on
            stderr.
    """
    from dsvae.generation import sampling
    from dsvae.generation.fitted_prior import load_prior
    from dsvae.generation.flow_prior import FlowPrior
    from dsvae.generation.session import check_not_empty

    given = (condition, conditions_file, file, text_column, condition_column)
    sampling.check(*given, source)
    flow = FlowPrior.of(source, steps, solver, guidance, label)
    conditional = any(each is not None for each in (condition, conditions_file, condition_column))
    with model.open(draws=True, conditions=conditional) as (vae, seed):
        prior = load_prior(model.model_dir) if source == "fitted" else flow
        rows = sampling.rows(vae, n, *given, seed=seed, prior=prior, **model.options)
        width = len(str(n))

        def line(row: dict[str, Any]) -> str:
            if conditions_file is None:
                return f"{row['sample']:>{width}}  {one_line(row['sentence'])}"
            head = f"{row['line']:>6}  {row['condition']}\n" if row["sample"] == 1 else ""
            return f"{head}{'':>6}  {one_line(row['sentence'])}"

        model.show(progress(rows, n if conditions_file is None else None), line)
        if conditions_file is not None:
            check_not_empty(vae, conditions_file)


@with_model(f"{READS} {GENERATES}")
def reconstruct(model: Model) -> None:
    """Decodes the posterior mean of each sentence of a file or of stdin.

    Memory does not grow with the file. With --json one object per line: "line" (number in
    the source, from 1, blank ones counted), "condition" if there is one, "sentence",
    "reconstruction". Otherwise the two stand one above the other, after the number.
    """

    def line(row: dict[str, Any]) -> str:
        return f"{row['line']:>6}  {row['sentence']}\n{'':>6}  {one_line(row['reconstruction'])}"

    with model.read() as (vae, records):
        made = vae.reconstruct_stream(records, **model.options)
        rows = ({**source.fields, "reconstruction": text} for source, text in made)
        model.show(progress(rows), line)


@with_model(GENERATES)
def interpolate(
    model: Model,
    a: str,
    b: str,
    *,
    steps: Annotated[int, at_least(2)] = 8,
    path: PathKind = "linear",
    condition: str | None = None,
) -> None:
    """Generates the sentences on the way from one sentence to another.

    The first and the last are the reconstructions of the two. With --json one object per
    line: "t" (0 to 1), "sentence".

    Args:
        a: the sentence to start from.
        b: the sentence to arrive at.
        steps: number of sentences, at least 2.
        path: linear, the straight line; slerp, along the great circle, while the norm
            changes linearly.
        condition: that of all sentences, for a conditional model.
    """
    with model.open(conditions=condition is not None) as (vae, _):
        texts = vae.interpolate(a, b, steps=steps, path=path, condition=condition, **model.options)
        rows = ({"t": i / (steps - 1), "sentence": text} for i, text in enumerate(texts))
        model.show(rows, lambda row: f"{row['t']:.3f}  {one_line(row['sentence'])}")


@with_model(GENERATES)
def analogy(model: Model, a: str, b: str, c: str, *, condition: str | None = None) -> None:
    """Generates the sentence that is to C as B is to A, from the latent z_b - z_a + z_c.

    With --json one object: "a", "b", "c", "sentence".

    Args:
        a: a sentence.
        b: what A became.
        c: another sentence, which is to change in the same way.
        condition: that of all four sentences, for a conditional model.
    """
    with model.open(conditions=condition is not None) as (vae, _):
        text = vae.analogy(a, b, c, condition=condition, **model.options)
        model.show([{"a": a, "b": b, "c": c, "sentence": text}], table)


@with_model(GENERATES)
def traverse(
    model: Model,
    a: str,
    *,
    dim: int,
    vector: int = 0,
    steps: int | None = None,
    width: float | None = None,
    scale: Scale | None = None,
    condition: str | None = None,
) -> None:
    """Generates the sentences along one unit of the latent, from the posterior mean of a
    sentence.

    A dimension goes through equally spaced values; a categorical variable goes through
    all its categories. With --json one object per line: "offset" (standard deviations)
    and "value" (the coordinate of z), or "category"; "sentence".

    Args:
        a: the sentence.
        dim: the dimension or variable to move, from 0; the others stay.
        vector: the vector that has it, from 0, for a model with several per text.
        steps: number of sentences, at least 2; 7 by default. For dimensions only.
        width: the dimension goes from -width to width standard deviations; 3 by default.
            For dimensions only.
        scale: prior (the default), the dimension takes the values that are usual over
            all sentences; posterior, it moves about the sentence's own value by the
            sentence's own uncertainty. For dimensions only.
        condition: that of the sentence, for a conditional model; a learned prior is that
            of this condition.
    """

    def line(row: dict[str, Any]) -> str:
        place = f"{row['category']:>3}" if "category" in row else f"{row['offset']:>+6.2f}"
        return f"{place}  {one_line(row['sentence'])}"

    from dsvae.generation.inputs import repeated

    with model.open(conditions=condition is not None) as (vae, _):
        places, latent = vae.traversal(
            a, dim, vector=vector, steps=steps, width=width, scale=scale, condition=condition
        )
        texts = vae.decode(latent, repeated(condition, len(latent)), **model.options)
        rows = zip(places, texts, strict=True)
        model.show(({**place, "sentence": text} for place, text in rows), line)


@with_model(f"batch_size {GENERATES}")
def edit(
    model: Model,
    a: str,
    *,
    set: str | None = None,
    toward: str | None = None,
    labels_file: str | None = None,
    text_file: str | None = None,
    strength: float | None = None,
    text_column: str = "text",
    condition: str | None = None,
    condition_column: str | None = None,
) -> None:
    """Changes a sentence: sets categories of its latent, or moves it toward a label.

    With --set, variables of a categorical latent get the categories that are given. With
    --toward, a continuous latent moves along an attribute vector: the mean latent of the
    sentences with that label minus the mean of all others. With --json one object:
    "sentence", "reconstruction" (nothing changed), "edited", and "set" or "strength".

    Args:
        a: the sentence.
        set: VARIABLE=CATEGORY, both from 0; several with commas between them (3=7,5=0).
        toward: a label of --labels_file.
        labels_file: one label per line, line i for sentence i of --text_file.
        text_file: the labelled sentences (.txt, .jsonl, .csv, .tsv, .parquet).
        strength: 1 (the default) goes by the distance of the two means; try 0.5 to 3.
        text_column: column of the sentence in --text_file, if it has columns.
        condition: that of the sentence, before and after, for a conditional model.
        condition_column: column of the condition in --text_file, for a conditional model.
    """
    from dsvae.generation import editing

    change = editing.read_change(
        set, toward, labels_file, text_file, strength, text_column, condition, condition_column
    )
    with model.open(conditions=condition is not None) as (vae, seed):
        row = editing.edit(vae, a, change, seed, condition, **model.options)
        shown = ("sentence", "reconstruction", "edited")
        model.show([row], lambda row: table({name: row[name] for name in shown}))


@with_model(f"{READS} {LOADS}")
def encode(
    model: Model,
    *,
    output: str,
    dtype: LatentType = "float32",
    kind: LatentFormat = "safetensors",
    shard_rows: Count | None = None,
) -> None:
    """Writes the posteriors of the sentences of a file or of stdin to a directory.

    It has shards (00000.safetensors, or .parquet) and manifest.json: the SHA-256 of the
    model's weights and of each shard, what is in a row, counts, and the normalizer, mean
    and standard deviation of z ~ q(z|x) over all rows. A row per sentence has line, the
    number in the source from 1; text; for the Gaussian mean and logvar (Z), natural
    logarithm of the variance; scale (Z), the standard deviations. A learned prior p(z|c) has
    the same with prior_ before the names. Of K vectors per text, they are (K, d), with
    valid (K): which vectors there are. The rows are raw, not normalized. Blank sentences
    are counted and have no row.

    Memory does not grow with the file. An interrupted command continues when it is
    repeated. It also runs on several ranks: deepspeed --module dsvae.cli encode ...

    Args:
        output: the directory.
        dtype: of the numbers. bf16 needs safetensors.
        kind: parquet has a column per name. In safetensors, text is the bytes of all
            texts, and text_end where each ends.
        shard_rows: lines per shard; by default about 128 MiB of numbers, and at most 65536.
    """
    # DeepSpeed logs to the stdout that is there when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        from dsvae.generation.latents import write_latents

    given: dict[str, Any] = {
        "output": output,
        "dtype": dtype,
        "kind": kind,
        "shard_rows": shard_rows,
    }
    file, text_column, condition_column = model.source
    given |= model.loading
    found = write_latents(model.model_dir, file, text_column, condition_column, **given)
    if int(os.environ.get("RANK", "0")) == 0:
        shown = {"blank": "blank sentences skipped", "truncated": "sentences truncated"}
        for name, what in shown.items():
            if number := found["counts"][name]:
                say(f"{number} {what}")
        say(f"{found['rows']} sentences in {output}, {len(found['shards'])} shards")


@with_model(f"batch_size {GENERATES}")
def decode(model: Model, latents: str, *, normalized: bool = False) -> None:
    """Generates the sentences of latents: the way back from dsvae encode.

    Memory does not grow with the number of latents. With --json one object per line:
    "line", "text" and "condition" if they are known, "decoded". Otherwise one sentence per
    line.

    Args:
        latents: a directory of dsvae encode, whose means are decoded; or a safetensors file
            with a tensor z, (N, Z) or (N, K, d). Of K vectors, those that are 0 are not
            there, or the file has valid (N, K).
        normalized: z of the file is (raw z - normalizer_mean) / normalizer_std, which are
            two more of its tensors.
    """
    from dsvae.generation.latents import check_latents, decode_latents

    with model.open(conditions=check_latents(latents, normalized)) as (vae, _):
        rows = decode_latents(vae, model.model_dir, latents, normalized, **model.options)
        model.show(progress(rows), lambda row: one_line(row["decoded"]))


@with_model(f"batch_size json {LOADS}")
def fit_prior(
    model: Model,
    *,
    train_file: str,
    kind: PriorKind = "gmm",
    components: int | None = None,
    text_column: str = "text",
    condition_column: str | None = None,
    seed: int = 0,
) -> None:
    """Fits a density to the latents of sentences, for dsvae sample --source fitted.

    It is for models of one vector per text. For several, train.py --phase prior trains the
    better prior, which dsvae sample --source flow draws from.

    It is fitted to one draw of q(z|x) per sentence, and written into MODEL_DIR, where it
    replaces an earlier one. Printed: the mean of log p(z) in nats over draws of held-out
    sentences (about 10%), under the model's prior and under the fitted one; and their
    difference with its standard error, by which KL(q(z) || p(z)) falls. With --json one
    object.

    Args:
        train_file: sentences of the training (.txt, .jsonl, .csv, .tsv, .parquet).
        kind: gaussian, mean and full covariance; gmm, a mixture of Gaussians; flow, a
            normalizing flow of affine couplings, which takes minutes.
        components: Gaussians of a gmm; by default as many as other draws (10%, none of
            the held-out ones) find best.
        condition_column: column of the condition of each sentence, for a conditional
            model with a fixed prior.
        seed: of the draws and of the fit.
    """
    from dsvae.generation import fitted_prior
    from dsvae.generation.reading import read_records

    if components is not None and kind != "gmm":
        raise UserError(f"--components is for --kind gmm, not {kind}: leave it out")
    records = read_records(train_file, text_column, condition_column, "--train_file")
    path = fitted_prior.place(model.model_dir)
    with model.open(seed=seed, conditions=condition_column is not None) as (vae, seed):
        read = progress(records, prints_rows=False)
        row = fitted_prior.fit_and_save(vae, read, path, kind, components, seed)
    shown = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()}
    model.show([row], lambda _: table(shown))


@with_model(f"{READS} json {LOADS}")
def cluster(model: Model) -> None:
    """Prints the cluster of each sentence of a file or of stdin, for a model with
    clusters.

    Each line has the most probable cluster (from 0), its probability and the sentence,
    with tabs between them. With --json one object per line: "line", "condition" if there
    is one, "sentence", "cluster", "probability".
    """
    from dsvae.generation.labelling import cluster_stream

    _show_most_probable(model, "cluster", cluster_stream)


@with_model(f"{READS} json {LOADS}")
def classify(model: Model) -> None:
    """Prints the class of each sentence of a file or of stdin, for a model that was
    trained with labels.

    Each line has the most probable class, its probability and the sentence, with tabs
    between them. With --json one object per line: "line", "condition" if there is one,
    "sentence", "class", "probability".
    """
    from dsvae.generation.labelling import classify_stream

    _show_most_probable(model, "class", classify_stream)


def _show_most_probable(model: Model, name: str, stream: Callable[..., Any]) -> None:
    """Prints what `stream` finds for each sentence, under `name` in JSON."""
    with model.read() as (vae, records):
        rows = (
            {**line.fields, name: found, "probability": probability}
            for line, found, probability in stream(vae, records)
        )
        model.show(
            progress(rows), lambda row: f"{row[name]}\t{row['probability']:.4f}\t{row['sentence']}"
        )


@with_model(f"{READS} json {LOADS}")
def tag(model: Model) -> None:
    """Prints the words of each sentence of a file or of stdin with their tags, for a model
    that was trained with tags.

    Words are what white space separates. Each line has a word and its tag, with a tab
    between them, and a blank line ends each sentence. The words of a truncated sentence end
    where it was cut. With --json one object per line: "line", "condition" if there is
    one, "sentence", "words", "tags", and "entities", each with its "type", "first" and
    "last" word (from 0) and "text".
    """
    from dsvae.generation.labelling import tag_stream

    def line(row: dict[str, Any]) -> str:
        pairs = zip(row["words"], row["tags"], strict=True)
        return "".join(f"{word}\t{tag}\n" for word, tag in pairs)

    with model.read() as (vae, records):
        rows = (
            {**source.fields, **found._asdict(), "entities": found.entities}
            for source, found in tag_stream(vae, records)
        )
        model.show(progress(rows), line)


def corpus(
    *,
    kind: CorpusKind = "plain",
    n: Count = 1000,
    seed: int = 0,
    output: str | None = None,
    factors: str | None = None,
    labelled: int | None = None,
) -> None:
    """Prints sentences of the built-in corpus, whose factors of variation are known.

    Args:
        kind: plain sentences, or records as JSON objects: paired (condition and text),
            relations (a marked sentence as the condition, its pair of entities as the
            text, its relation as the label), tagged (text, label and tags).
        n: number of sentences, drawn with replacement; the first k are those of -n k.
        seed: another seed gives another corpus.
        output: the file to write, one sentence or object per line; stdout by default.
            Records need a name that ends in .jsonl.
        factors: a .csv file for the factors; row i contains the indices of the values of
            line i.
        labelled: for tagged, only the first records have a label and tags.
    """
    from dsvae.data.grammar_variants import draw_lines, write_variant

    if output is not None:
        write_variant(output, kind, n, seed, factors, labelled)
    elif factors is not None:
        raise UserError("--factors needs --output: the two files belong together, line by line")
    else:
        for drawn in draw_lines(kind, n, seed, labelled):
            print(drawn.text)


def cache(
    *,
    cache_dir: str | None = None,
    older_than: float = 0,
    clear: bool = False,
    json: bool = False,
) -> None:
    """Lists the tokenized corpora that training keeps for the next run, or removes them.

    A corpus that a run uses is not removed. One that is removed is made again when a run
    needs it.

    Args:
        cache_dir: data.cache_dir of the runs; by default the one that runs use by default.
        older_than: only corpora with which no run began for so many days.
        clear: remove what is listed, and what killed runs have left.
    """
    from dsvae.data import cache as module

    found = module.entries(cache_dir, older_than)
    used = {entry.path for entry in module.clear(found)} if clear else set()
    if not found:
        say(f"no tokenized corpora in {module.root_of(cache_dir)}")
    rows = (
        {**entry._asdict(), "path": str(entry.path)}
        | ({"removed": entry.path not in used} if clear else {})
        for entry in found
    )
    state = {None: "", True: ", removed", False: ", kept: a run uses it"}
    show(
        rows,
        json,
        lambda row: (
            f"{row['path']}  {row['size'] / 1e6:,.1f} MB, {row['sentences']:,} sentences of "
            f"{row['source']}, last used {row['days']:.1f} days ago{state[row.get('removed')]}"
        ),
    )


def evaluate(
    model_dir: str,
    *,
    test_file: str | None = None,
    labels_file: str | None = None,
    output: str | None = None,
    samples: int = 1,
    iw_samples: int | None = None,
    sentences: int | None = None,
    batch_tokens: int = 16384,
    text_column: str = "text",
    condition_column: str | None = None,
    label_column: str | None = None,
    tags_column: str | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    noise_sentences: int = 0,
) -> None:
    """Measures a model: likelihood, information in the latent, reconstruction, and use of
    the latent.

    It also runs on several ranks: deepspeed --module dsvae.cli evaluate ...

    Args:
        test_file: sentences (.txt, .jsonl, .csv, .tsv, .parquet); the built-in corpus by
            default.
        labels_file: one label per line, line i for sentence i, to measure how well the
            latent tells them apart.
        condition_column: column of the condition in --test_file, for a model that reads
            conditions.
        label_column: column of the label, if any, which is used like that of
            --labels_file and scores the model's classes or clusters.
        tags_column: column of the tags, if any, one per whitespace word, which score the
            model's tags.
        output: directory for metrics.json, report.html and the projector; by default
            MODEL_DIR/evaluation, and ./evaluation for a hub id.
        samples: samples of z per sentence for the ELBO.
        iw_samples: samples of z per sentence for the importance-weighted bound; without
            it, the bound is not measured.
        sentences: measure only this many of the sentences, which are chosen by a hash of
            their texts; by default all.
        batch_tokens: limit of padded tokens per forward pass on one rank; it changes only
            the speed.
        max_tokens: longest sentence in tokens, EOS included; longer ones are truncated
            and counted. By default data.max_tokens of the model's training, or 64 if the
            model does not say.
        seed: of the draws of z and of the folds of the probes, from 0 to 2^53 - 1.
        precision: fp32, tf32 (NVIDIA GPUs: float32 weights, faster products) or bf16.
            metrics.json says which.
        noise_sentences: reconstruct this many of the sentences, chosen by hash, from z with
            noise of 0, 0.1, 0.2, 0.3, 0.5, 0.7 and 1 standard deviations of z; 0: none.
    """
    given = locals()
    # DeepSpeed logs to the stdout that is there when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        from dsvae.reports.evaluation import evaluate_directory

    evaluate_directory(**given)


def evaluate_samples(
    model_or_file: str,
    *,
    reference: str,
    lm: str,
    train_file: str | None = None,
    samples: int = 2000,
    source: SourceKind = "prior",
    steps: Count | None = None,
    solver: SolverKind | None = None,
    guidance: float | None = None,
    label: str | None = None,
    output: str | None = None,
    text_column: str = "text",
    seed: int = 0,
    max_tokens: int = 512,
    batch_size: int = 128,
    device: str | None = None,
    precision: Precision = "fp32",
    **options: Any,
) -> None:
    """Measures generated texts: fluency, coverage, diversity, memory and likeness.

    Beside them stand held-out texts, texts drawn from the language model and, unless they
    are measured themselves, texts of z from the prior.

    Args:
        model_or_file: model directory or hub id that texts are drawn from, or a file of
            texts (.txt, .jsonl, .csv, .tsv, .parquet).
        reference: held-out texts. Half of them, or as many as --samples, are a row of
            their own, and all are compared with the others.
        lm: directory of a language model (--injection none) that reads the texts. It
            should be trained on other text than the model.
        train_file: what the model was trained on, for memorisation and copies.
        samples: texts per row.
        source: prior, fitted, flow or aggregate, as of dsvae sample; aggregate takes the
            texts of --train_file.
        output: directory for samples.json and samples.html; by default
            MODEL_DIR/evaluation, and ./evaluation for a file or a hub id.
        seed: of everything that is drawn.
    """
    given = locals()
    from dsvae.reports import sample_evaluation

    sample_evaluation.evaluate_samples(**given)


def export(
    run: str, *, checkpoint: str = "latest", output: str | None = None, adapters: bool = False
) -> None:
    """Writes the model of a checkpoint as a transformers directory like OUTPUT_DIR/model.

    The weights are float32 for every precision, ZeRO stage and number of ranks. It takes
    one process on CPU. The run is only read, and may still be running. The directory
    appears whole or not at all, and its name is printed.

    Args:
        run: output directory of the run. Its checkpoints contain pickles, which can run
            code: name only what you trust.
        checkpoint: latest, best (smallest loss on validation text in the running phase),
            or a name as in OUTPUT_DIR/checkpoints, such as phase2-step00001000.
        output: the directory to write, which must not exist; RUN/exports/CHECKPOINT by
            default.
        adapters: write the adapters (model.lora) and the latent path alone, as the package
            peft reads them.
    """
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # DeepSpeed logs to stdout as soon as it is imported
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from dsvae.export import export_checkpoint

            directory = export_checkpoint(run, checkpoint, output, say, adapters=adapters)
    finally:
        logging.disable(logging.NOTSET)
    print(directory)


def package(model_dir: str, *, output: str) -> None:
    """Writes a model with its code, to load with transformers where dsvae is not
    installed.

    AutoModel.from_pretrained(DIR, trust_remote_code=True) and AutoTokenizer load it.
    Weights are hard links if the disk allows them. The directory appears whole or not at
    all, and its name is printed.

    Args:
        output: the directory to write, which must not exist.
    """
    from dsvae import hub

    print(hub.package(model_dir, output))


def push(model_dir: str, repo: str, *, private: bool = False, revision: str | None = None) -> None:
    """Uploads a model with its code to the Hugging Face hub, and prints its address.

    What is uploaded is what dsvae package writes. Log in first (hf auth login), or set
    HF_TOKEN. The model card names the files and data of the training: read it before.

    Args:
        repo: USER/NAME or ORGANIZATION/NAME; it is made if it does not exist.
        private: make it private; a public one that exists is refused.
        revision: the branch, main by default; it is made if it does not exist.
    """
    from dsvae import hub

    print(hub.push(model_dir, repo, private, revision))


def compare(
    runs: list[str],
    *,
    output: str | None = None,
    sort_by: str | None = None,
    group: bool = False,
) -> None:
    """Compares runs: the settings in which they differ, their progress, and their
    metrics.

    A run that is not finished shows its newest validation values, with a star. The
    printed table is Markdown. Written: comparison.csv (every metric in full, standard
    errors too), comparison.svg (rec against kl), and noise.svg (BLEU against noise on z) if
    a run has it.

    Args:
        runs: output directories of runs; a directory that contains them one level down,
            as after a sweep, stands for all of them.
        output: directory to write into; by default `comparison` beside the runs, or in
            the current directory if they are in different ones. An earlier comparison
            there is replaced.
        sort_by: name of a column or of any metric, best first and finished runs before
            the others; by default the given order.
        group: show finished runs that differ only in their seed as one row: the mean of
            each metric ± its standard deviation over these runs (`sd.NAME` in
            comparison.csv).
    """
    from dsvae.files import make_writable
    from dsvae.reports.compare import compare_runs
    from dsvae.reports.compare_report import place, text, write
    from dsvae.reports.runs import find_runs

    directories, passed_over = find_runs(runs)
    if passed_over:
        more = f" and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
        say(f"skipped, because they are not directories: {', '.join(passed_over[:3])}{more}")
    comparison = compare_runs(directories, sort_by, group)
    directory = place(directories, output)
    make_writable(directory, "--output")
    if (directory / "comparison.csv").exists():
        say(f"the earlier comparison in {directory} is replaced")
    files = write(directory, comparison)
    print(text(comparison))
    print("\n" + "\n".join(f"{what:<12} {path}" for what, path in files.items()))


def plan(
    model: str,
    *,
    gpus: Count = 1,
    gpu_memory: str = "80GB",
    gpus_per_node: Count = 8,
    host_memory: str = "512GB",
    margin: Annotated[float, Rule("in [0, 100)", lambda share: 0 <= share < 100)] = 10.0,
    config: str | None = None,
    ds_config: str | None = None,
    gradient_checkpointing: bool | None = None,
    json: bool = False,
    **fields: Any,
) -> None:
    """Estimates what training needs per GPU and node, and prints the fastest command that
    fits.

    The estimate needs neither the weights nor a network; docs/plan.md says how it is made
    and checked. The exit code is 0 even if nothing fits: then the output says what would.

    Args:
        model: a public T5, v1.1, flan, mT5, umT5, ByT5 or UL2 by its hub id, a
            directory with a config.json, a recipe or a YAML file.
        gpus: number of GPUs on all nodes together.
        gpu_memory: memory per GPU: 40GB (10^9), 80GiB (2^30).
        gpus_per_node: the number of GPUs of a node.
        host_memory: memory per node.
        margin: per cent of each memory to leave free.
        config: recipe or YAML file of the run, for a model given by its name (park2021).
        ds_config: plan only for this DeepSpeed configuration, not for the shipped ones.
        gradient_checkpointing: plan only with it, or only without it (false).
        json: prints one JSON object, with sizes in bytes.
    """
    given = {name: value for name, value in locals().items() if name not in ("json", "fields")}
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout as it is imported
        from dsvae.planning.command import plan_command

        text, line = plan_command(**given, fields=fields)
    print(line if json else text)


def train(
    *,
    ds_config: str | None = None,
    config: str | None = None,
    num_gpus: Count | None = None,
    num_nodes: Count | None = None,
    hostfile: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    master_addr: str | None = None,
    master_port: Count | None = None,
    **fields: Any,
) -> None:
    """Trains a model, as deepspeed dsvae/train.py does in a checkout.

    It starts DeepSpeed's launcher, which starts one process per GPU.

    Args:
        ds_config: a shipped DeepSpeed configuration by its name (zero2), or a file.
        config: recipe by its name, or a YAML file; quickstart by default.
        num_gpus: this and the flags below are those of DeepSpeed's launcher: GPUs of each
            node; all by default.
        num_nodes: number of nodes of the hostfile; all by default.
        hostfile: one line per node, with its number of GPUs: worker-0 slots=4.
        include: nodes and GPUs to take, as in worker-0:0,2@worker-1.
        exclude: nodes and GPUs to leave out.
        master_addr: address at which the processes meet.
        master_port: its port.
    """
    given = locals()
    from dsvae.shipped import launch

    own = {"ds_config": ds_config, "config": config, **fields}
    launcher = {name: given[name] for name in given if name not in (*own, "fields")}
    launch(_words(launcher), _words(own))


def _words(flags: dict[str, Any]) -> list[str]:
    """Returns the flags that have a value as words of a command line."""
    given = {name: value for name, value in flags.items() if value is not None}
    return [f"--{name}={value}" for name, value in given.items()]


def slurm(*, output: str) -> None:
    """Writes the scripts for a cluster with SLURM, to edit, and prints their directory.

    slurm/site.sh in it describes the cluster; docs/slurm.md explains the rest. The
    DeepSpeed configurations are beside the scripts. The package itself is a link: run
    the command again with another DIR after dsvae has moved.

    Args:
        output: the directory to write, which must not exist.
    """
    from dsvae.shipped import write_slurm

    print(write_slurm(output))


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_GENERATION = (sample, reconstruct, interpolate, analogy, traverse, edit, encode, decode, fit_prior)
_LABELLING = (cluster, classify, tag)
_OPTIONS = "\n".join(f"    --{name} {kind.__name__}" for name, kind in OPTIONS.items())
_SHORT = "\n".join(f"    --{short}, --{field}" for short, field in ALIASES.items())
COMMANDS = commands(
    (
        evaluate,
        evaluate_samples,
        export,
        package,
        push,
        compare,
        *_GENERATION,
        *_LABELLING,
        corpus,
        cache,
        slurm,
    ),
    OPTIONS,
    f"OPTIONS OF GENERATE\n{_OPTIONS}",
    SHARED,
) | commands(
    (train, plan),
    run_flags(),
    "FIELDS OF THE RUN\n    every flag of python dsvae/train.py --help; the short ones are\n"
    + _SHORT,
)


def main(argv: list[str] | None = None) -> int:
    """Runs what a command line asks for, and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # from the deepspeed launcher
    words = [word for word in words if not word.startswith("--local_rank=")]
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        prepare_streams()
        private_names.check_versions()
        with terminable():
            if words == ["--version"]:
                print(f"dsvae {version('dsvae')}")
            else:
                dispatch(COMMANDS, words, "dsvae")
            sys.stdout.flush()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            say(f"error: {error}")
        return EXIT_USER_ERROR
    except RunStopped as stopped:  # several ranks that did not meet
        say(stopped.message)
        return stopped.code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        abandon_stdout()  # the reader has closed the pipe
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        abandon_stdout()
        say(
            f"error: the results cannot be written: {error.strerror}; free some space, and "
            f"repeat the command"
        )
        return EXIT_DISK
    return 0


if __name__ == "__main__":
    sys.exit(main())
