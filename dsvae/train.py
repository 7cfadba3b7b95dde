"""A training run, top to bottom: configure, data, the phases, evaluate, export.

    deepspeed dsvae/train.py --ds_config ds_configs/zero2.json

It also runs under `python`, torchrun and srun. Every rank runs all of it; what rank 0
does alone goes through `world.run_on_rank0`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `deepspeed dsvae/train.py` puts dsvae/ itself first on the path, where `config`,
# `data` or `metrics` would hide other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# A lost rank is then one line, and not one line below the stack traces of torch's own
# sockets.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Steps differ in their shapes. Otherwise a GPU's memory would fragment into pieces that
# fit none of them.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

if __name__ == "__main__":
    # Until `Stopping` listens, there is nothing to save. The imports below alone take
    # seconds, or minutes on a cold file system.
    for _number, _code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

from dsvae import private_names
from dsvae.errors import EXIT_DISK, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunStopped, UserError

try:
    private_names.check_versions()  # the imports below fail in other releases
except UserError as error:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"dsvae: error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)

import datasets
import numpy as np
from deepspeed.utils import logger as deepspeed_logger
from transformers.utils import logging as transformers_logging

from dsvae import config as configuration
from dsvae.config import RunConfig
from dsvae.data.batches import TrainingBatches
from dsvae.data.prepared import Prepared, load_prepared, prepare
from dsvae.data.sources import source_of
from dsvae.data.tokenization import TokenizedSplit
from dsvae.engine import checkpoint, ds_config, reshape_checkpoint, weights
from dsvae.engine.assemble import phase_engine
from dsvae.engine.checkpoint import Checkpoint
from dsvae.engine.engine import PhaseEngine
from dsvae.engine.non_finite import SkippedSteps
from dsvae.engine.prior import PriorEngine
from dsvae.failures import end_process, explain
from dsvae.files import write_json
from dsvae.inference.kept import Kept
from dsvae.inference.passes import Passes, texts_of
from dsvae.metrics import flow
from dsvae.metrics.evaluate import evaluate
from dsvae.metrics.labelled import add
from dsvae.metrics.reconstruction import fidelity, samples
from dsvae.metrics.throughput import Speed
from dsvae.objective.schedules import next_beta
from dsvae.parallel.device import describe, local_device
from dsvae.parallel.stopping import Stopping
from dsvae.parallel.world import World, join, leave
from dsvae.phases import Phase
from dsvae.pretrained import precision_of
from dsvae.reports import trackers
from dsvae.reports.card import write_card
from dsvae.reports.run_text import data_text, finished_text, mixture_text, phase_text
from dsvae.reports.training_log import Reporter
from dsvae.run_directory import RunDirectory
from dsvae.start import data_of, find_start, write_down
from dsvae.usage import help_text


def main(argv: list[str] | None = None) -> int:
    """Runs what a command line asks for; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        if int(os.environ.get("RANK", "0")) == 0:
            print(help_text())
        return 0
    _quiet_libraries()
    world: World | None = None
    reporter: Reporter | None = None
    reading = True  # files and words that all ranks read alike
    stopping = Stopping()
    try:
        stopping.install()
        config = configuration.read(words)
        raw = ds_config.load(str(config.ds_config))
        trackers.check(config.report_to)
        private_names.check()
        local_device()
        reading = False
        world = join(config.hang_timeout)
        reporter = Reporter(config, world.is_main)
        if world.watchdog is not None:
            world.watchdog.before_leaving = reporter.ended
        run(config, raw, world, stopping, reporter)
    except BaseException as error:
        code = EXIT_INTERRUPTED  # if a second Ctrl-C cuts the lines below short
        # Signals wait: launchers send one as soon as the first rank has failed.
        with stopping.defer_signals(), suppress(KeyboardInterrupt):
            code, reason = explain(error, world, reading, stopping)
            if reporter is not None:
                reporter.ended(code, reason)
            # To the others this rank is not lost: it has left, with this code.
            if world is not None and world.watchdog is not None:
                world.watchdog.close(code)
    else:
        code = 0
        with stopping.defer_signals():
            leave(world)
    return code


def _quiet_libraries() -> None:
    deepspeed_logger.setLevel(os.environ.get("DSVAE_DEEPSPEED_LOG", "WARNING").upper())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


@dataclass(frozen=True)
class Run:
    """What all parts of a run need."""

    config: RunConfig
    world: World
    reporter: Reporter
    stopping: Stopping
    data: Prepared

    @property
    def directory(self) -> RunDirectory:
        """Where the run writes everything."""
        return RunDirectory(self.config.output_dir)


def run(
    config: RunConfig,
    raw: dict[str, Any],
    world: World,
    stopping: Stopping,
    reporter: Reporter,
) -> None:
    """Does a whole run on this rank.

    Args:
        raw: the DeepSpeed configuration as it was read.

    Raises:
        UserError: on every rank alike.
        RunStopped: on every rank alike, or on this one alone if there is nothing left
            to save.
    """
    directory = RunDirectory(config.output_dir)
    configuration.choose_micro_batches(config, world.device.type)
    reporter.say(f"device: {describe(world.device)}; ranks: {world.size}")
    lock: list[Any] = []  # held by rank 0 until the run leaves this function
    world.run_on_rank0(lambda: lock.append(directory.claim()))
    sentences = functools.cache(lambda: data_of(config))  # reads the files once
    start = world.run_on_rank0(lambda: find_start(config, reporter.say, sentences))
    if not start.phases:
        world.run_on_rank0(lambda: reporter.say(finished_text(config)))
        return
    reporter.begin()

    # Data: rank 0 tokenizes, or finds it in the cache; every rank maps the result into
    # memory. A tokenizer comes with a pretrained model; one trained on the corpus is
    # made once and stays with the run.
    source = config.model.name or (str(start.tokenizer) if start.tokenizer else None)
    vocab_size = None if source else config.model.vocab_size
    path = world.run_on_rank0(
        lambda: prepare(
            config.data,
            tokenizer=source,
            vocab_size=vocab_size,
            seed=config.seed,
            corpus=sentences(),
        )
    )
    data = world.run_on_all(lambda: load_prepared(path))
    reporter.say(data_text(data.report, world.size))
    if mixture := data.mixture(config.data.weights):
        reporter.say(mixture_text(data.report["splits"]["train"]["files"], mixture, config))

    this = Run(config, world, reporter, stopping, data)
    weights_from, metrics = start.weights, None
    for number in start.phases:
        phase = start.phase(number, config)
        resumed = start.resumed(phase)
        with phase_engine(phase, raw, data, weights_from, world, resumed) as (engine, batches):
            resolved = directory.resolved_ds_config(number)
            world.run_on_rank0(functools.partial(write_json, resolved, engine.ds_config))
            reporter.say(phase_text(phase, engine, resolved))
            reporter.detail(json.dumps(engine.ds_config, indent=2))
            if number == start.phases[0]:
                # Only now: an earlier mistake leaves nothing in output_dir that the
                # corrected command would stumble over.
                world.run_on_rank0(lambda: write_down(config, raw, data.tokenizer, sentences()))
                reporter.open(phase.offset + (resumed.step if resumed else 0) + 1)
            if resumed:
                _load(this, engine, resumed)
            with stopping.defer_signals():
                train_phase(this, phase, engine, batches, resumed)
            if number == 1 or number < start.phases[-1]:
                # Adapters go on training in phase 2, and not after it.
                weights_from = directory.phase1_model if number == 1 else directory.phase2_model
                weights.export(
                    engine.module,
                    engine.origin,
                    world,
                    weights_from,
                    _save_tokenizer(data),
                    merge=number != 1,
                )
            else:
                metrics = finish(this, phase, engine)
    reporter.close(metrics)
    world.run_on_rank0(lambda: reporter.say(finished_text(config)))


def _save_tokenizer(data: Prepared) -> Callable[[Path], None]:
    def save(directory: Path) -> None:
        data.tokenizer.save_pretrained(directory)

    return save


def train_phase(
    run: Run,
    phase: Phase,
    engine: PhaseEngine,
    batches: TrainingBatches,
    resumed: Checkpoint | None,
) -> None:
    """Runs the optimizer steps of one phase, with the logging, evaluations and
    checkpoints between them.

    Args:
        resumed: the checkpoint that the engine was loaded from; None: a fresh phase.

    Raises:
        RunStopped: on every rank: a signal came, and the state is saved; no checkpoint
            could be saved; or nothing finite came for too long.
    """
    config, world, reporter, data = run.config, run.world, run.reporter, run.data
    valid = data.splits["valid"]
    # A choice that does not depend on the order of the file.
    watched = valid.select(np.sort(np.argsort(valid.content_keys)[: config.eval.sentences]))
    speed = Speed(engine.module, engine.precision)

    def decode(ids: list[int]) -> str:
        return str(data.tokenizer.decode(ids, skip_special_tokens=True))

    skipped = SkippedSteps(
        config.max_skipped_steps, run.directory, phase.number, decode, reporter.say
    )
    done, beta = resumed.step if resumed else 0, 0.0
    if phase.controlled and resumed:
        beta = world.run_on_rank0(lambda: resumed.meta["beta"])
    reporter.start_phase(phase.number, phase.steps, done)
    for index in range(done, phase.steps):
        penalty = phase.penalty(index, beta)
        lr = engine.lr
        step = batches.step(index)
        sums = engine.train_step(index, step, penalty)
        speed.count(step)
        reporter.advance()

        done = index + 1
        last = done == phase.steps
        skipped.count(engine, world, index, step, sums)
        stop = run.stopping.agreed(world)
        logged = done % config.log_every == 0 or last
        if logged or phase.controlled:
            means = sums.means(world)
        if phase.controlled and not sums.skipped:
            beta = next_beta(beta, float(means.kl.sum()), config.phase2.beta)
        if logged:
            values = {
                **means.values(step),
                **({} if phase.trains_prior else {"beta": penalty.beta}),
                **({"free_bits": penalty.free_bits} if phase.released else {}),
                "lr": lr,
                "grad_norm": engine.grad_norm,
                "skipped_steps": float(engine.skipped_steps),
                "epoch": done / batches.steps_per_epoch,
                **speed.read(),
            }
            reporter.scalars(phase.offset + done, phase.number, values, means.kl.tolist())
        valid_loss = None
        if last or (config.eval_every and done % config.eval_every == 0):
            valid_loss = _validate(run, phase, engine, watched, phase.offset + done)
            speed.read()  # evaluation is not training time
        if last or stop or (config.checkpoint_every and done % config.checkpoint_every == 0):
            meta = {"valid": valid_loss, "steps_before": phase.offset, "beta": beta}
            _save(run, phase, engine, done, meta, leaving=stop is not None)
            speed.read()
        if stop:
            raise stop
    reporter.end_phase()


def _validate(
    run: Run, phase: Phase, engine: PhaseEngine, watched: TokenizedSplit, step: int
) -> float:
    """Measures and shows validation sentences after global step `step`; returns the
    value by which the best checkpoint is known."""
    pairs: list[tuple[str, str]] = []
    if isinstance(engine, PriorEngine):
        metrics, prior = _evaluate_prior(run, engine, watched)
    else:
        metrics, pairs, prior = _evaluate(run, engine, watched, iw_samples=0)
    run.reporter.evaluation(step, phase.number, "valid", metrics)
    shown = ("flow_loss", "rec", "kl", "mi", "au", "rec_shuffled", "class_accuracy", "entity_f1")
    values = (
        f"{name} {metrics[name]:.4g}"
        for name in (*shown, "b3_f1")
        if name in metrics and not math.isnan(metrics[name])
    )
    run.reporter.say(f"step {step}: valid {' '.join(values)}")
    run.reporter.text(step, pairs, prior)
    return phase.validation_loss(metrics)


def _evaluate_prior(
    run: Run, engine: PriorEngine, split: TokenizedSplit
) -> tuple[dict[str, Any], list[str]]:
    """Returns the losses of the averaged denoiser on sentences, and sentences that it
    generates."""
    settings, limit = run.config.eval, run.config.data.max_tokens
    passes = Passes(engine.module, run.world, token_budget=settings.batch_tokens)
    denoiser = engine.averaged()
    losses = flow.measure(passes, split, denoiser)
    given = (split, denoiser, run.data.tokenizer, settings.shown, limit)
    return losses, flow.flow_samples(passes, *given)


def _evaluate(
    run: Run, engine: PhaseEngine, split: TokenizedSplit, kept: Kept | None = None, **options: Any
) -> tuple[dict[str, Any], list[tuple[str, str]], list[str]]:
    """Returns the metrics of sentences, reconstructions of the first ones, and
    sentences from the prior. `options` are those of `metrics.evaluate.evaluate`."""
    settings, data = run.config.eval, run.data
    passes = Passes(engine.module, run.world, token_budget=settings.batch_tokens, kept=kept)
    metrics, measured = evaluate(passes, split, samples=settings.samples, **options)
    limit = run.config.data.max_tokens
    if kept is not None and settings.reconstructions:
        chosen = np.sort(np.argsort(split.content_keys)[: settings.reconstructions])
        # The text is known as tokens alone. An unknown piece must not count as recovered.
        unknown = str(data.tokenizer.unk_token)
        texts = [
            text.replace(unknown, "\N{REPLACEMENT CHARACTER}")
            for text in texts_of(split.rows(chosen), data.tokenizer)
        ]
        given = (measured, chosen, texts, data.tokenizer, limit, settings.noise_sentences)
        add(metrics, fidelity(passes, split, *given))
    rows = np.arange(min(settings.shown, len(split)))
    shown = samples(passes, split, measured.encoded, data.tokenizer, rows, limit)
    if kept is not None and (stop := kept.stop()):
        raise stop
    return metrics, *shown


def _load(run: Run, engine: PhaseEngine, resumed: Checkpoint) -> None:
    """Puts the engine into the state of a checkpoint."""
    with run.world.suspend_hang_detection():
        converted = checkpoint.load(
            engine.deepspeed,
            resumed,
            run.world,
            run.directory.checkpoints,
            [group.names for group in engine.groups],
            engine.frozen,
        )
    if isinstance(engine, PriorEngine):
        engine.load_averages(resumed.directory / checkpoint.AVERAGES)
    if converted:
        run.reporter.say(converted)
    run.reporter.say(f"resuming from {resumed.directory}")


def _save(
    run: Run, phase: Phase, engine: PhaseEngine, step: int, meta: dict[str, Any], leaving: bool
) -> None:
    """Saves a checkpoint after optimizer step `step` of the phase.

    Args:
        leaving: whether the run ends after it, and cannot continue without it.
    """
    config, reporter = run.config, run.reporter
    reporter.flush()
    meta |= {
        **reshape_checkpoint.shape_of(engine.deepspeed, run.world),
        "frozen": engine.frozen,
        "lr_scales": engine.lr_scales,
        **({"spread": engine.spread.state()} if engine.spread else {}),
        **({"normalizer": engine.normalizer} if isinstance(engine, PriorEngine) else {}),
        "denoiser": engine.module.config.denoiser,
        "vector_counts": engine.module.config.vector_counts,
        "classes": engine.module.config.classes,
        "tags": engine.module.config.tags,
    }
    try:
        checkpoint.save(
            engine.deepspeed,
            run.world,
            run.directory.checkpoints,
            phase=phase.number,
            step=step,
            meta=meta,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            report=reporter.say,
            averages=engine.averages() if isinstance(engine, PriorEngine) else None,
        )
        reporter.saved(step)
    except checkpoint.SaveFailed as failure:
        if leaving or config.on_save_error == "stop":
            raise RunStopped(
                EXIT_DISK,
                f"error: {failure}; make room, and the same command continues from there",
            ) from None
        reporter.say(f"warning: {failure}; on_save_error is continue, so training continues")


def finish(run: Run, phase: Phase, engine: PhaseEngine) -> dict[str, Any]:
    """Runs the final evaluation on all test sentences, and the export. metrics.json
    comes last: it says that everything is there.

    Raises:
        RunStopped: on every rank: a signal came. The results so far are kept, and the
            next start continues from them.
    """
    config, world, data, directory = run.config, run.world, run.data, run.directory
    test = data.splits["test"]
    # float32 under autocast, which is for training
    precision = precision_of(engine.module)
    last = directory.checkpoints / checkpoint.tag(phase.number, phase.steps)
    identity = world.run_on_rank0(lambda: f"{checkpoint.identity(last)} {precision}")
    kept = Kept(directory.evaluation, identity, world, lambda: run.stopping.agreed(world))
    with run.stopping.defer_signals():
        metrics, pairs, prior = _evaluate(
            run,
            engine,
            test,
            kept,
            iw_samples=config.eval.iw_samples if config.model.has_latent else 0,
            more=data.splits["train"],
            entropy=source_of(config.data).entropy,
            unk=data.report["splits"]["test"]["unk"],
        )
        if isinstance(engine, PriorEngine):
            losses, prior = _evaluate_prior(run, engine, test)
            metrics |= losses
    metrics["precision"] = precision
    run.reporter.evaluation(phase.offset + phase.steps, phase.number, "test", metrics)

    def extras(target: Path) -> None:
        data.tokenizer.save_pretrained(target)
        write_card(target / "README.md", config, engine.module.config, metrics, pairs, prior)

    averaged = engine.averaged_weights() if isinstance(engine, PriorEngine) else nullcontext()
    with averaged:
        weights.export(engine.module, engine.origin, world, directory.model, extras)
    world.run_on_rank0(lambda: write_json(directory.metrics, {"test": metrics}))
    world.run_on_rank0(kept.remove)
    return metrics


if __name__ == "__main__":
    end_process(main())
