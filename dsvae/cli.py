"""The `dsvae` command: evaluate a trained model, and use its latent space.

Results go to stdout, in UTF-8, and nothing else does; warnings, counts and progress go
to stderr. A mistake of the user is one line on stderr and exit code 2; results that
find no room are one line and exit code 74.
"""

# No `from __future__ import annotations`: fire shows the annotations in its help, and
# command_line.py reads them. What needs torch is imported inside the commands: help and
# usage errors should not wait for it.

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from dsvae import private_names
from dsvae.command_line import command, dispatch
from dsvae.errors import EXIT_DISK, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunStopped, UserError
from dsvae.generation.options import OPTIONS, check

if TYPE_CHECKING:
    from dsvae.generation import SentenceVAE


@command(OPTIONS)
def sample(
    model_dir: str,
    *,
    n: int = 20,
    source: Literal["prior", "aggregate"] = "prior",
    file: str | None = None,
    text_column: str = "text",
    seed: int | None = None,
    json: bool = False,
    batch_size: int = 128,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """Sentences of random latents.

    With --json one object a line: "sample" (from 1), "sentence"; with --source
    aggregate also "line" and "from", the sentence whose posterior was sampled and its
    number in the file.

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        n: number of sentences.
        source: prior draws z from p(z); aggregate from q(z|x) of sentences drawn from
            --file: where the decoder has been.
        file: sentences for --source aggregate (.txt, .jsonl, .csv, .tsv, .parquet).
        text_column: column of the sentence in --file, where it has columns.
        seed: repeats the output exactly; without it a fresh one is drawn and told on
            stderr.
        json: one JSON object a line.
        batch_size: sentences at a time.
        max_tokens: longest sentence of --file in tokens, EOS included; longer ones are
            truncated and counted on stderr.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate: --do_sample --temperature --top_p
            --top_k --num_beams --max_new_tokens (128) and more; without any the most
            likely token is taken each time (greedy).
    """
    if n < 1:
        raise UserError(f"-n is {n}: give at least 1")
    if (source == "aggregate") != (file is not None):
        raise UserError(
            "--source aggregate and --file belong together: the file's sentences are encoded and "
            "their z sampled"
        )
    check(options)
    if file is None:
        vae = _load(model_dir, device, batch_size, max_tokens)
        seed = _seed(seed, needed=True)
        rows = (
            {"sample": i, "sentence": text}
            for i, text in enumerate(vae.prior_stream(n, seed=seed, **options), 1)
        )
    else:
        from dsvae.generation.reading import draw_sentences, read_sentences

        # a missing file is told before the model is loaded
        read_sentences(file, text_column, "--file")
        vae = _load(model_dir, device, batch_size, max_tokens)
        seed = _seed(seed, needed=True)
        drawn = vae.posterior_stream(
            draw_sentences(file, text_column, n, seed), seed=seed, **options
        )
        rows = (
            {"sample": i, "sentence": text, "line": line.line, "from": line.text}
            for i, (line, text) in enumerate(drawn, 1)
        )
    width = len(str(n))
    _show(
        _progress(rows, n),
        json,
        lambda row: f"{row['sample']:>{width}}  {_one_line(row['sentence'])}",
    )
    _report(vae)


@command(OPTIONS)
def reconstruct(
    model_dir: str,
    file: str | None = None,
    *,
    text_column: str = "text",
    json: bool = False,
    seed: int | None = None,
    batch_size: int = 128,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """Sentences of a file or of stdin, each with what the decoder makes of its
    posterior mean.

    Memory does not grow with the file. With --json one object a line: "line" (number in
    the source, from 1, blank ones counted), "sentence", "reconstruction"; otherwise the
    two stand one above the other, behind the number.

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        file: sentences (.txt, .jsonl, .csv, .tsv, .parquet); stdin, one a line, where
            it is left out or -.
        text_column: column of the sentence, where the file has columns.
        json: one JSON object a line.
        seed: repeats the output of --do_sample exactly.
        batch_size: sentences at a time.
        max_tokens: longest sentence in tokens, EOS included; longer ones are truncated
            and counted on stderr.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate: --num_beams --do_sample --temperature
            --top_p --max_new_tokens (128) and more; without any the most likely token
            is taken each time (greedy).
    """
    from dsvae.generation.reading import read_sentences

    check(options)
    sentences = read_sentences(file, text_column)
    vae = _load(model_dir, device, batch_size, max_tokens)
    _seed(seed, needed=bool(options.get("do_sample")))
    pairs = vae.reconstruct_stream(sentences, **options)
    rows = (
        {"line": line.line, "sentence": line.text, "reconstruction": text} for line, text in pairs
    )

    def both(row: dict[str, Any]) -> str:
        return f"{row['line']:>6}  {row['sentence']}\n{'':>6}  {_one_line(row['reconstruction'])}"

    _show(_progress(rows), json, both)
    _check_not_empty(vae, file)
    _report(vae)


@command(OPTIONS)
def interpolate(
    model_dir: str,
    a: str,
    b: str,
    *,
    steps: int = 8,
    path: Literal["linear", "slerp"] = "linear",
    json: bool = False,
    seed: int | None = None,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """The sentences on the way from one sentence to another.

    The first and the last are the reconstructions of the two. With --json one object a
    line: "t" (0 to 1), "sentence".

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        a: the sentence to start from.
        b: the sentence to arrive at.
        steps: number of sentences, at least 2.
        path: linear, the straight line; slerp, along the great circle, with the norm
            going linearly.
        json: one JSON object a line.
        seed: repeats the output of --do_sample exactly.
        max_tokens: longest sentence in tokens, EOS included; a longer one is an error.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate (see dsvae sample --help).
    """
    if steps < 2:
        raise UserError(f"--steps is {steps}: a path needs at least 2, its two ends")
    vae = _load_for_few(model_dir, device, max_tokens, seed, options)
    texts = vae.interpolate(a, b, steps=steps, path=path, **options)
    rows = ({"t": i / (steps - 1), "sentence": text} for i, text in enumerate(texts))
    _show(rows, json, lambda row: f"{row['t']:.3f}  {_one_line(row['sentence'])}")
    _report(vae)


@command(OPTIONS)
def analogy(
    model_dir: str,
    a: str,
    b: str,
    c: str,
    *,
    json: bool = False,
    seed: int | None = None,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """The sentence that is to C as B is to A: of the latent z_b - z_a + z_c.

    With --json one object: "a", "b", "c", "sentence".

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        a: a sentence.
        b: what became of it.
        c: another sentence, to which the same is to be done.
        json: one JSON object.
        seed: repeats the output of --do_sample exactly.
        max_tokens: longest sentence in tokens, EOS included; a longer one is an error.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate (see dsvae sample --help).
    """
    vae = _load_for_few(model_dir, device, max_tokens, seed, options)
    row = {"a": a, "b": b, "c": c, "sentence": vae.analogy(a, b, c, **options)}
    _show([row], json, _table)
    _report(vae)


@command(OPTIONS)
def traverse(
    model_dir: str,
    a: str,
    *,
    dim: int,
    steps: int = 7,
    width: float = 3.0,
    scale: Literal["prior", "posterior"] = "prior",
    json: bool = False,
    seed: int | None = None,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """The sentences along one dimension of the latent, from the posterior mean of a
    sentence.

    With --json one object a line: "offset" (standard deviations), "value" (the
    coordinate of z), "sentence".

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        a: the sentence.
        dim: the dimension to move, from 0; the others stay.
        steps: number of sentences, at least 2.
        width: the dimension goes from -width to width standard deviations.
        scale: prior, it takes the values that are usual over all sentences; posterior,
            it moves about the sentence's own value by the sentence's own uncertainty.
        json: one JSON object a line.
        seed: repeats the output of --do_sample exactly.
        max_tokens: longest sentence in tokens, EOS included; a longer one is an error.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate (see dsvae sample --help).
    """
    vae = _load_for_few(model_dir, device, max_tokens, seed, options)
    offsets, latent = vae.traversal(a, dim, steps=steps, width=width, scale=scale)
    found = zip(offsets, latent[:, dim].tolist(), vae.decode(latent, **options), strict=True)
    rows = ({"offset": offset, "value": value, "sentence": text} for offset, value, text in found)
    _show(rows, json, lambda row: f"{row['offset']:>+6.2f}  {_one_line(row['sentence'])}")
    _report(vae)


@command(OPTIONS)
def edit(
    model_dir: str,
    a: str,
    *,
    toward: str,
    labels_file: str,
    text_file: str,
    strength: float = 1.0,
    text_column: str = "text",
    json: bool = False,
    seed: int | None = None,
    batch_size: int = 128,
    max_tokens: int = 512,
    device: str | None = None,
    **options: Any,
) -> None:
    """A sentence moved towards a label, along an attribute vector.

    The vector is the mean latent of the sentences with that label minus the mean of all
    others. With --json one object: "sentence", "reconstruction" (strength 0), "edited",
    "strength".

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        a: the sentence.
        toward: a label of --labels_file.
        labels_file: one label a line, line i for sentence i of --text_file.
        text_file: the labelled sentences (.txt, .jsonl, .csv, .tsv, .parquet).
        strength: 1 goes by the distance of the two means; try 0.5 to 3.
        text_column: column of the sentence in --text_file, where it has columns.
        json: one JSON object.
        seed: repeats the output of --do_sample exactly.
        batch_size: sentences at a time.
        max_tokens: longest sentence in tokens, EOS included; longer ones of --text_file
            are truncated and counted, A is refused.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
        options: those of transformers' generate (see dsvae sample --help).
    """
    from dsvae.generation.reading import check_labels, read_labels, read_sentences

    check_labels(labels_file, text_file, text_column, toward)
    check(options)
    vae = _load(model_dir, device, batch_size, max_tokens)
    seed = _seed(seed, needed=bool(options.get("do_sample")))
    vae.encode([a])  # a sentence that cannot be taken is told before the file is encoded
    sentences = _progress(read_sentences(text_file, text_column, "--text_file"), quiet_output=True)
    direction = vae.attribute_vector(sentences, read_labels(labels_file), toward)
    found = {}
    for name, by in (("reconstruction", 0.0), ("edited", strength)):
        # sampled tokens of both from the same numbers: what differs is the strength
        _seed(seed, needed=False)
        found[name] = vae.edit(a, direction, strength=by, **options)
    row = {"sentence": a, **found, "strength": strength}
    _show(
        [row],
        json,
        lambda row: _table({name: row[name] for name in ("sentence", "reconstruction", "edited")}),
    )
    _report(vae)


@command()
def encode(
    model_dir: str,
    file: str | None = None,
    *,
    output: str,
    text_column: str = "text",
    batch_size: int = 128,
    max_tokens: int = 512,
    device: str | None = None,
) -> None:
    """The posteriors of the sentences of a file or of stdin, as a safetensors file.

    Tensors, a row a sentence: mean and logvar (N, Z) float32 (natural logarithm of the
    variance), and line (N,) int64, the number of the sentence in its source, from 1:
    blank ones are counted and have no row. Memory does not grow with the file; the disk
    beside the output holds it twice for a moment. The output appears whole or not at
    all.

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        file: sentences (.txt, .jsonl, .csv, .tsv, .parquet); stdin, one a line, where
            it is left out or -.
        output: the file to write.
        text_column: column of the sentence, where the file has columns.
        batch_size: sentences at a time.
        max_tokens: longest sentence in tokens, EOS included; longer ones are truncated
            and counted on stderr.
        device: cpu, cuda, cuda:1, ...; the accelerator where there is one.
    """
    from dsvae.generation.latents_file import LatentsFile
    from dsvae.generation.reading import read_sentences

    sentences = read_sentences(file, text_column)
    with LatentsFile(output, {"format": "pt", "dsvae": version("dsvae")}) as latents:
        vae = _load(model_dir, device, batch_size, max_tokens)
        for lines, posterior in vae.encode_stream(_progress(sentences, quiet_output=True)):
            latents.add([line.line for line in lines], posterior)
        _check_not_empty(vae, file)
    _report(vae)
    _say(f"{latents.rows} sentences in {output}")


@command()
def corpus(
    *, n: int = 1000, seed: int = 0, output: str | None = None, factors: str | None = None
) -> None:
    """Sentences of the built-in corpus, whose factors of variation are known.

    Args:
        n: number of sentences, drawn with replacement; the first k are those of -n k.
        seed: another seed, another corpus.
        output: the file to write, one sentence a line; stdout where it is left out.
        factors: a .csv file for the factors: row i holds the indices of the values that
            line i was made of.
    """
    from dsvae.data.grammar import draw, write_corpus

    if n < 1:
        raise UserError(f"-n is {n}: give at least 1")
    if output is not None:
        write_corpus(output, n, seed, factors)
    elif factors is not None:
        raise UserError("--factors needs --output: the two files belong together, line by line")
    else:
        for drawn in draw(n, seed):
            print(drawn.text)


@command()
def evaluate(
    model_dir: str,
    *,
    test_file: str | None = None,
    labels_file: str | None = None,
    output: str | None = None,
    samples: int = 1,
    iw_samples: int | None = None,
    batch_tokens: int = 16384,
    text_column: str = "text",
    max_tokens: int | None = None,
    seed: int = 0,
) -> None:
    """What a model is worth: likelihood, information in the latent, reconstruction, and
    use of the latent.

    Also on several ranks: deepspeed --module dsvae.cli evaluate ...

    Args:
        model_dir: model directory of a run (OUTPUT_DIR/model), or a hub id.
        test_file: sentences (.txt, .jsonl, .csv, .tsv, .parquet); the built-in corpus
            where it is left out.
        labels_file: one label a line, line i for sentence i: how well the latent tells
            them apart.
        output: directory for metrics.json, report.html and the projector; where it is
            left out MODEL_DIR/evaluation, for a hub id ./evaluation.
        samples: samples of z a sentence for the ELBO.
        iw_samples: samples of z a sentence for the importance-weighted bound; without
            it there is none.
        batch_tokens: most padded tokens of one forward pass on one rank; changes the
            speed only.
        text_column: column of the sentence, where the file has columns.
        max_tokens: longest sentence in tokens, EOS included; longer ones are truncated
            and counted. Where it is left out that of the model's training
            (data.max_tokens), 64 for a model that does not say.
        seed: of the draws of z, and of the folds of the probes; from 0 to 2^53 - 1.
    """
    # DeepSpeed logs to the stdout that it finds when it is imported
    with contextlib.redirect_stdout(sys.stderr):
        from dsvae.reports.evaluation import evaluate_model

    evaluate_model(
        model_dir,
        test_file=test_file,
        labels_file=labels_file,
        output=output,
        samples=samples,
        iw_samples=iw_samples,
        batch_tokens=batch_tokens,
        text_column=text_column,
        max_tokens=max_tokens,
        seed=seed,
    )


@command()
def export(run: str, *, checkpoint: str = "latest", output: str | None = None) -> None:
    """The model of a checkpoint of a run, finished or not, as a transformers directory
    like OUTPUT_DIR/model.

    Weights in float32, whatever the precision, the ZeRO stage and the number of ranks.
    One process on CPU; the run is only read and may be going on. The directory appears
    whole or not at all; its name is printed.

    Args:
        run: output directory of the run. Its checkpoints hold pickles, which can run
            code: name only what you trust.
        checkpoint: latest, best (smallest loss on validation text in the phase that is
            running), or a name as in OUTPUT_DIR/checkpoints, such as
            phase2-step00001000.
        output: the directory to write, which must not exist; RUN/exports/CHECKPOINT
            where it is left out.
    """
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # DeepSpeed logs to stdout from its import on
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from dsvae.export import export_checkpoint

            directory = export_checkpoint(run, checkpoint, output, _say)
    finally:
        logging.disable(logging.NOTSET)
    print(directory)


@command()
def compare(runs: list[str], *, output: str | None = None, sort_by: str | None = None) -> None:
    """Runs side by side: the settings in which they differ, how far each has come, and
    its metrics.

    A run that is not finished shows its newest validation values, with a star. Written:
    comparison.md (the table that is printed), comparison.csv and comparison.json (every
    metric in full, standard errors too), comparison.svg (rec against kl).

    Args:
        runs: output directories of runs; a directory that holds them one level down, as
            a sweep leaves, stands for all of them.
        output: directory to write into; where it is left out `comparison` beside the
            runs, or in the current directory if they lie in different ones. An earlier
            comparison there is replaced.
        sort_by: name of a column or of any metric, best first and finished runs before
            the others; the order given if left out.
    """
    from dsvae.files import make_writable
    from dsvae.reports.compare import compare_runs
    from dsvae.reports.compare_report import place, text, write
    from dsvae.reports.runs import find_runs

    directories, passed_over = find_runs(runs)
    if passed_over:
        more = f" and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
        _say(f"passed over, being no directories: {', '.join(passed_over[:3])}{more}")
    found = compare_runs(directories, sort_by)
    directory = place(directories, output)
    make_writable(directory, "--output")
    if (directory / "comparison.json").exists():
        _say(f"the earlier comparison in {directory} is replaced")
    files = write(directory, found)
    print(text(found))
    print("\n" + "\n".join(f"{what:<12} {path}" for what, path in files.items()))


@command()
def plan(
    model: str,
    *,
    gpus: int = 1,
    gpu_memory: str = "80GB",
    gpus_per_node: int = 8,
    host_memory: str = "512GB",
    margin: float = 10.0,
    config: str | None = None,
    ds_config: str | None = None,
    gradient_checkpointing: bool | None = None,
    batch_tokens: int | None = None,
    eval_batch_tokens: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    phase: Literal["all", "1", "2"] | None = None,
    freeze_decoder: bool | None = None,
    injection: Literal["memory", "embedding", "both", "none"] | None = None,
    latent_dim: int | None = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] | None = None,
    json: bool = False,
) -> None:
    """What training needs of every GPU and node, by DeepSpeed configuration; the
    fastest that fits, and its command.

    An estimate, made without the weights and without a network; how it is made and
    checked: docs/plan.md. The exit code is 0 also where nothing fits: then it says what
    would.

    Args:
        model: a public T5, v1.1, flan, mT5, umT5, ByT5 or UL2 by its hub id, a
            directory with a config.json, a recipe or a YAML file.
        gpus: GPUs of the run, all nodes together.
        gpu_memory: of one GPU: 40GB (10^9), 80GiB (2^30).
        gpus_per_node: most GPUs of one node.
        host_memory: of one node.
        margin: per cent of every memory to leave free.
        config: recipe or YAML file of the run, for a model given by its name
            (park2021).
        ds_config: plan for this DeepSpeed configuration alone, not for the shipped
            ones.
        gradient_checkpointing: plan with it alone, or without it alone (false).
        batch_tokens: data.micro_batch_tokens, most padded tokens of a forward pass on a
            GPU.
        eval_batch_tokens: eval.batch_tokens, the same in evaluation.
        max_tokens: data.max_tokens, longest sentence.
        batch_size: data.batch_size, sentences of a step.
        phase: which phases are to run.
        freeze_decoder: phase1.freeze_decoder.
        injection: how z enters the decoder.
        latent_dim: dimensions of z.
        precision: as the run's.
        json: one JSON object, sizes in bytes.
    """
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout as it is imported
        from dsvae.planning.command import plan_command

        text, line = plan_command(
            model,
            config=config,
            gpus=gpus,
            gpu_memory=gpu_memory,
            gpus_per_node=gpus_per_node,
            host_memory=host_memory,
            margin=margin,
            gradient_checkpointing=gradient_checkpointing,
            ds_config=ds_config,
            flags={
                "data.micro_batch_tokens": batch_tokens,
                "eval.batch_tokens": eval_batch_tokens,
                "data.max_tokens": max_tokens,
                "data.batch_size": batch_size,
                "phase": phase,
                "phase1.freeze_decoder": freeze_decoder,
                "injection": injection,
                "latent_dim": latent_dim,
                "precision": precision,
            },
        )
    print(line if json else text)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        evaluate,
        export,
        compare,
        sample,
        reconstruct,
        interpolate,
        analogy,
        traverse,
        edit,
        encode,
        corpus,
        plan,
    )
}


def main(argv: list[str] | None = None) -> int:
    """Runs what a command line asks for; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # from the deepspeed launcher
    words = [word for word in words if not word.startswith("--local_rank=")]
    warnings.filterwarnings("ignore", category=FutureWarning)
    if sys.stderr is None:  # closed by who called us; `print` would take None for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    try:
        _check_stdout()
        with _terminable():
            if words == ["--version"]:
                print(f"dsvae {version('dsvae')}")
            else:
                dispatch(COMMANDS, words, "dsvae")
            sys.stdout.flush()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            _say(f"error: {error}")
        return EXIT_USER_ERROR
    except ImportError as error:
        if (refusal := private_names.explain(error)) is None:
            raise
        _say(f"error: {refusal}")
        return EXIT_USER_ERROR
    except RunStopped as stopped:  # several ranks that did not meet
        _say(stopped.message)
        return stopped.code
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()  # who read our output has had enough of it
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _abandon_stdout()
        _say(
            f"error: the results cannot be written: {error.strerror}; make room, and repeat the "
            f"command"
        )
        return EXIT_DISK
    return 0


def _check_stdout() -> None:
    """Makes stdout UTF-8 like every file that is read and written, whatever the locale;
    a terminal keeps its encoding.

    Raises UserError where there is none.
    """
    if sys.stdout is None:
        raise UserError("stdout is closed: send the results to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = sys.stdout.encoding if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def _abandon_stdout() -> None:
    """Python would fail once more when it flushes stdout at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM an exception, so that temporary files are taken away."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _load(model_dir: str, device: str | None, batch_size: int, max_tokens: int) -> "SentenceVAE":
    from transformers.utils import logging

    from dsvae.generation import SentenceVAE

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return SentenceVAE.from_pretrained(
        model_dir, device=device, batch_size=batch_size, max_tokens=max_tokens
    )


def _load_for_few(
    model_dir: str, device: str | None, max_tokens: int, seed: int | None, options: dict[str, Any]
) -> "SentenceVAE":
    """The model for a command that takes its sentences from the command line."""
    check(options)
    vae = _load(model_dir, device, 128, max_tokens)
    _seed(seed, needed=bool(options.get("do_sample")))
    return vae


def _seed(seed: int | None, *, needed: bool) -> int:
    """Seeds torch; a fresh seed is told, where anything is `needed` to be random."""
    import torch

    from dsvae.generation.sentence_vae import check_seed

    fresh = check_seed(seed)
    if needed and seed is None:
        _say(f"seed {fresh} (--seed {fresh} repeats this)")
    torch.manual_seed(fresh)
    return fresh


def _show(
    rows: Iterable[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]
) -> None:
    """Prints rows as they come."""
    for row in rows:
        print(json.dumps(row, ensure_ascii=False) if as_json else line(row), flush=True)


def _table(row: dict[str, Any]) -> str:
    """Name and value of every field, a line each."""
    width = max(map(len, row))
    return "\n".join(f"{name:<{width}}  {_one_line(value)}" for name, value in row.items())


def _one_line(text: str) -> str:
    """Generated text on one line: byte vocabularies can produce line ends."""
    return " ".join(text.splitlines())


def _progress(
    rows: Iterable[Any], total: int | None = None, *, quiet_output: bool = False
) -> Iterable[Any]:
    """The same rows under a progress bar, where someone looks at stderr and nothing
    else is written to the terminal."""
    if not sys.stderr.isatty() or (sys.stdout.isatty() and not quiet_output):
        return rows
    from tqdm import tqdm

    return tqdm(
        rows, total=total, unit="sentence", unit_scale=True, dynamic_ncols=True, leave=False
    )


def _check_not_empty(vae: "SentenceVAE", file: str | None) -> None:
    if not vae.counts.sentences:
        from dsvae.generation.reading import no_sentences

        raise no_sentences("stdin" if file in (None, "-") else str(file))


def _report(vae: "SentenceVAE") -> None:
    """Says on stderr what was not taken as it came."""
    counts = vae.counts
    if counts.blank:
        _say(f"{counts.blank} blank sentences skipped")
    if counts.truncated:
        _say(f"{counts.truncated} sentences truncated to {vae.max_tokens} tokens (--max_tokens)")
    if counts.unfinished:
        _say(f"{counts.unfinished} generated sentences cut before their end (--max_new_tokens)")


def _say(text: str) -> None:
    print(f"dsvae: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
