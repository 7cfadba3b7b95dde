"""The run, top to bottom: configure, data, phase 1, phase 2, evaluate, export.

    deepspeed dsvae/train.py --ds_config ds_configs/zero2.json

Also under `python`, torchrun and srun. Every rank runs all of it; what rank 0 does
alone goes through `world.run_on_rank0`.
"""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

# `deepspeed dsvae/train.py` puts dsvae/ itself first on the path, where `config`,
# `data` or `metrics` would hide other packages.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

# a lost rank is one line, not one under stacks of torch's own sockets
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if __name__ == "__main__":
    # Until `Stopping` listens, there is nothing to save: the imports below alone take
    # seconds, on a cold file system minutes.
    for _number, _code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        signal.signal(_number, lambda *_, code=_code: os._exit(code))

from dsvae import private_names

sys.excepthook = private_names.except_hook  # for the imports below

import datasets
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from transformers.utils import logging as transformers_logging

from dsvae import config as configuration
from dsvae import run_directory
from dsvae.config import RunConfig
from dsvae.data.batches import TrainingBatches, most_micro_batches
from dsvae.data.corpora import entropy
from dsvae.data.tokenization import Prepared, load_prepared, prepare
from dsvae.engine import checkpoint, ds_config, nvme, reshape_checkpoint, weights
from dsvae.engine.build import build_model
from dsvae.engine.checkpoint import Checkpoint
from dsvae.engine.engine import PhaseEngine
from dsvae.engine.non_finite import SkippedSteps
from dsvae.engine.process_group import lend_to_deepspeed
from dsvae.errors import (
    EXIT_DEFECT,
    EXIT_DISK,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    RunStopped,
    UserError,
)
from dsvae.files import replace_directory, write_json, write_text
from dsvae.metrics.evaluate import against_entropy, evaluate
from dsvae.metrics.kept import Kept
from dsvae.metrics.text import samples
from dsvae.metrics.throughput import Speed
from dsvae.objective.schedules import next_beta
from dsvae.parallel import watchdog
from dsvae.parallel.stopping import Stopping
from dsvae.parallel.world import World, join, leave, may_come_from_another_rank
from dsvae.phases import Phase
from dsvae.reports.card import write_card
from dsvae.reports.training_log import Reporter, data_lines, result_table
from dsvae.usage import help_text

sys.excepthook = sys.__excepthook__

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def main(argv: list[str] | None = None) -> int:
    """Runs what a command line asks for; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        if int(os.environ.get("RANK", "0")) == 0:
            print(help_text())
        return 0
    deepspeed_logger.setLevel(os.environ.get("DSVAE_DEEPSPEED_LOG", "WARNING").upper())
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    world: World | None = None
    reading = True  # what all ranks read alike
    stopping = Stopping()
    try:
        stopping.install()
        config = configuration.read(words)
        raw = ds_config.load(str(config.ds_config))
        private_names.check()
        reading = False
        world = join(config.hang_timeout)
        run(config, raw, world, stopping)
    except BaseException as error:
        code = EXIT_INTERRUPTED  # where a second Ctrl-C cuts the lines below short
        # Signals wait: launchers send one as soon as the first rank has failed.
        with stopping.between_steps(), suppress(KeyboardInterrupt):
            code = _explain(error, world, reading, stopping)
            # For the others this rank is not lost, and repeating is no help.
            if world is not None and world.watchdog is not None:
                world.watchdog.close(code)
    else:
        code = 0
        with stopping.between_steps():
            leave(world)
    return code


def _explain(error: BaseException, world: World | None, reading: bool, stopping: Stopping) -> int:
    """Says on stderr what ends this rank; its exit code."""
    if isinstance(error, UserError):
        _complain_of(error, f"error: {error}", world, reading)
        return EXIT_USER_ERROR
    if isinstance(error, RunStopped):
        # where the ranks never met, rank 0 may be the one that is missing
        _complain(error.message, everywhere=world is None)
        return error.code
    if isinstance(error, KeyboardInterrupt):
        _complain(
            "interrupted twice, left at once; the same command goes on from the last complete "
            "checkpoint"
        )
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        line = (
            f"error: {error}; make room, and the same command goes on from the last complete "
            f"checkpoint"
        )
        _complain_of(error, line, world, reading)
        return EXIT_DISK
    if may_come_from_another_rank(error):
        if world is not None and world.watchdog is not None and (lost := world.watchdog.lost()):
            line, code = lost
            _complain(f"error: rank {world.rank}: {line}; {watchdog.advice(code)}", everywhere=True)
            return code
        if stopping.pending is not None:  # this rank left the operation on a signal
            _complain(stopping.pending.message)
            return stopping.pending.code
    _show_stack(error, world)
    return EXIT_DEFECT


def _show_stack(error: BaseException, world: World | None) -> None:
    """The stack of a defect. The other ranks do not repeat what rank 0 has shown."""
    stack = "".join(traceback.format_exception(error))
    digest = hashlib.sha256(stack.encode()).hexdigest()
    others = world.watchdog if world is not None else None
    if world is not None and others is not None and not world.is_main and others.complained(digest):
        last = stack.strip().splitlines()[-1]
        line = f"error: rank {world.rank}: {last} (its stack is that of rank 0)"
        _complain(line, everywhere=True)
        return
    sys.excepthook(type(error), error, error.__traceback__)
    if others is not None:
        others.complain(digest)


def _complain_of(error: Exception, line: str, world: World | None, reading: bool) -> None:
    """One line for an error that every rank has; the rank's own line for one that it
    may be alone with."""
    if reading:
        # A node may lack the files, so each has its line; its other ranks read the
        # same.
        _complain(
            line, everywhere=int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0
        )
    elif world is None:
        _complain(line, everywhere=True)
    elif getattr(error, "shared", False) or world.is_main or world.watchdog is None:
        _complain(line)
        if world.watchdog is not None:
            world.watchdog.complain(line)
    elif not world.watchdog.complained(line):
        _complain(line.replace("error: ", f"error: rank {world.rank}: ", 1), everywhere=True)


def _complain(line: str, everywhere: bool = False) -> None:
    if everywhere or int(os.environ.get("RANK", "0")) == 0:
        print(f"dsvae: {line}", file=sys.stderr, flush=True)


def run(config: RunConfig, raw: dict[str, Any], world: World, stopping: Stopping) -> None:
    """A whole run on this rank.

    Args:
        raw: the DeepSpeed configuration as it was read.

    Raises:
        UserError: on every rank alike.
        RunStopped: on every rank alike, or on this one alone where nothing is left to
            be saved.
    """
    lend_to_deepspeed(world)
    out = Path(config.output_dir)
    reporter = Reporter(config, world.is_main)
    lock: list[Any] = []  # held by rank 0 until the run leaves this function
    world.run_on_rank0(lambda: lock.append(run_directory.claim(out)))
    sentences = functools.cache(lambda: run_directory.data_of(config))  # reads the files once
    start = world.run_on_rank0(lambda: run_directory.find_start(config, reporter.say, sentences))
    if not start.phases:
        world.run_on_rank0(lambda: _say_finished(config, reporter))
        return

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
    reporter.say(data_lines(data.report, world.size))
    for split in ("valid", "test"):
        if copies := data.report["splits"][split]["in_train"]:
            reporter.say(
                f"warning: {copies} of the {len(data.splits[split])} {split} sentences are also "
                f"training sentences"
            )

    weights_from = start.weights
    # One axis of steps: phase 2 counts on behind a phase 1 that came before it, in this
    # process or in an earlier one.
    before_phase2 = config.phase1.steps if 1 in start.phases or start.weights else 0
    if (last := start.checkpoint) and last.phase == 2:
        # begun in another directory
        before_phase2 = world.run_on_rank0(lambda: last.meta.get("steps_before", before_phase2))
    first_step = (start.checkpoint.step if start.checkpoint else 0) + (
        before_phase2 if start.phases[0] == 2 else 0
    )
    metrics = None
    for number in start.phases:
        phase = Phase(number, config, before_phase2 if number == 2 else 0)
        resumed = (
            start.checkpoint if start.checkpoint and start.checkpoint.phase == number else None
        )
        with ExitStack() as cleanup:
            with world.suspend_hang_detection():
                engine, batches = _engine(phase, raw, weights_from, data, world, reporter, cleanup)
            if number == start.phases[0]:
                # Only now: a mistake until here leaves nothing in output_dir that the
                # corrected command would stumble over.
                world.run_on_rank0(lambda: _write_down(config, raw, data, sentences(), out))
                reporter.open(first_step + 1)
            if resumed:
                with world.suspend_hang_detection():
                    converted = checkpoint.load(
                        engine.deepspeed, resumed, world, out / "checkpoints", engine.frozen
                    )
                if converted:
                    reporter.say(converted)
                reporter.say(f"going on from {resumed.directory}")
            with stopping.between_steps():
                train_phase(phase, engine, batches, data, world, reporter, stopping, resumed)
            if number == 1:
                weights_from = out / "phase1" / "model"
                weights.export(
                    engine.module, engine.origin, world, weights_from, _save_tokenizer(data)
                )
            else:
                metrics = finish(phase, engine, data, world, reporter, stopping)
            engine.close()
    reporter.close(metrics)
    world.run_on_rank0(lambda: _say_finished(config, reporter))


def train_phase(
    phase: Phase,
    engine: PhaseEngine,
    batches: TrainingBatches,
    data: Prepared,
    world: World,
    reporter: Reporter,
    stopping: Stopping,
    resumed: Checkpoint | None,
) -> None:
    """The optimizer steps of one phase, with what is logged, evaluated and saved between
    them.

    Args:
        resumed: the checkpoint that the engine was loaded from; None: a fresh phase.

    Raises:
        RunStopped: on every rank: told to stop and saved; no checkpoint could be saved;
            or nothing finite came for too long.
    """
    config, offset = phase.config, phase.offset
    valid = data.splits["valid"]
    # any order of the file
    watched = valid.select(np.sort(np.argsort(valid.content_keys)[: config.eval.sentences]))
    speed = Speed(engine.module, engine.precision)

    def decode(ids: list[int]) -> str:
        return str(data.tokenizer.decode(ids, skip_special_tokens=True))

    skipped = SkippedSteps(
        config.max_skipped_steps, Path(config.output_dir), phase.number, decode, reporter.say
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
        stop = stopping.agreed(world)
        valid_loss = None
        logged = done % config.log_every == 0 or last
        if logged or phase.controlled:
            rec, statistics = sums.means(world)
            kl = statistics[: engine.units]
        if phase.controlled and not sums.skipped:
            beta = next_beta(beta, float(kl.sum()), config.phase2.beta)
        if logged:
            values = {
                "loss": rec + float(penalty(statistics, engine.units)),
                "rec": rec,
                # free of how long the sentences of this step happen to be
                "rec_per_token": rec * step.sentences / step.tokens,
                "kl": float(kl.sum()),
                "beta": penalty.beta,
                "lr": lr,
                "grad_norm": engine.grad_norm,
                "skipped_steps": float(engine.skipped_steps),
                "epoch": done / batches.steps_per_epoch,
                **speed.read(),
            }
            reporter.scalars(offset + done, phase.number, values, kl.tolist())
        if last or (config.eval_every and done % config.eval_every == 0):
            found = evaluate(
                engine.module,
                watched,
                world,
                samples=config.eval.samples,
                token_budget=config.eval.batch_tokens,
            )
            reporter.evaluation(offset + done, phase.number, "valid", found)
            valid_loss = found["rec"] + (found["kl"] if phase.number == 2 else 0.0)
            reporter.say(
                f"step {offset + done}: valid rec {found['rec']:.2f} kl {found['kl']:.2f} mi "
                f"{found['mi']:.2f} "
                f"au {found['au']} rec_shuffled {found['rec_shuffled']:.2f}"
            )
            pairs, prior = samples(
                engine.module,
                watched,
                data.tokenizer,
                world,
                config.eval.shown,
                config.data.max_tokens,
            )
            reporter.text(offset + done, pairs, prior)
            speed.read()  # evaluation is not training time
        if last or stop or (config.checkpoint_every and done % config.checkpoint_every == 0):
            reporter.flush()
            meta = {
                **reshape_checkpoint.shape_of(engine.deepspeed, world),
                "frozen": engine.frozen,
                "valid": valid_loss,
                "steps_before": offset,
                "beta": beta,
            }
            try:
                checkpoint.save(
                    engine.deepspeed,
                    world,
                    Path(config.output_dir) / "checkpoints",
                    phase=phase.number,
                    step=done,
                    meta=meta,
                    keep=config.keep_checkpoints,
                    keep_best=config.keep_best,
                    report=reporter.say,
                )
            except checkpoint.SaveFailed as failure:
                if stop or config.on_save_error == "stop":
                    raise RunStopped(
                        EXIT_DISK,
                        f"error: {failure}; make room, and the same command goes on from there",
                    ) from None
                reporter.say(
                    f"warning: {failure}; training goes on without (on_save_error is continue)"
                )
            speed.read()
        if stop:
            raise stop
    reporter.end_phase()


def finish(
    phase: Phase,
    engine: PhaseEngine,
    data: Prepared,
    world: World,
    reporter: Reporter,
    stopping: Stopping,
) -> dict[str, Any]:
    """The final evaluation on all test sentences, and the export; metrics.json comes
    last and says that all is there.

    Raises:
        RunStopped: on every rank: told to stop. What the evaluation has found so far is
            kept, and the next start goes on from there.
    """
    config = phase.config
    out = Path(config.output_dir)
    # float32 under autocast, which is for training
    precision = PRECISIONS[next(engine.module.parameters()).dtype]
    last = out / "checkpoints" / checkpoint.tag(2, config.phase2.steps)
    identity = world.run_on_rank0(lambda: f"{checkpoint.identity(last)} {precision}")
    kept = Kept(out / ".evaluation", identity, world, lambda: stopping.agreed(world))
    with stopping.between_steps():
        metrics = evaluate(
            engine.module,
            data.splits["test"],
            world,
            samples=config.eval.samples,
            iw_samples=config.eval.iw_samples,
            token_budget=config.eval.batch_tokens,
            more=data.splits["train"],
            kept=kept,
        )
        if stop := stopping.agreed(world):
            raise stop
    unk = data.report["splits"]["test"]["unk"]
    metrics |= against_entropy(metrics, entropy(config.data), unk)
    metrics["precision"] = precision
    reporter.evaluation(phase.offset + phase.steps, phase.number, "test", metrics)
    pairs, prior = samples(
        engine.module,
        data.splits["test"],
        data.tokenizer,
        world,
        config.eval.shown,
        config.data.max_tokens,
    )

    def extras(directory: Path) -> None:
        data.tokenizer.save_pretrained(directory)
        write_card(directory / "README.md", config, metrics, pairs, prior)

    weights.export(engine.module, engine.origin, world, out / "model", extras)
    world.run_on_rank0(lambda: write_json(out / "metrics.json", {"test": metrics}))
    world.run_on_rank0(kept.remove)
    return metrics


def _engine(
    phase: Phase,
    raw: dict[str, Any],
    weights_from: Path | None,
    data: Prepared,
    world: World,
    reporter: Reporter,
    cleanup: ExitStack,
) -> tuple[PhaseEngine, TrainingBatches]:
    """The engine of a phase around its model, and its batches, agreed on how a step is
    cut.

    Args:
        cleanup: what the engine has on a disk goes with it.
    """
    config = phase.config
    train = data.splits["train"]
    given = raw.get("gradient_accumulation_steps", "auto")
    most = most_micro_batches(
        train.lengths, config.data.batch_size, world.size, config.data.micro_batch_tokens
    )
    accelerator = get_accelerator()
    resolved = ds_config.resolve(
        raw,
        phase=phase.settings,
        precision=config.precision,
        batch_size=config.data.batch_size,
        micro_batches=most,
        world_size=world.size,
        bf16_supported=accelerator.is_bf16_supported(),
        fp16_supported=accelerator.is_fp16_supported(),
    )
    ds_config.check_with_deepspeed(resolved)
    cleanup.enter_context(nvme.place(resolved, config.output_dir, world))
    if ds_config.precision_of(resolved) == "fp16":
        reporter.say(
            "warning: T5 was trained in bf16 and overflows easily in fp16; prefer bf16 where the "
            "GPU has it"
        )
    model, origin = build_model(
        config.model, data.tokenizer, weights_from, config.seed, world, resolved
    )
    model.config.max_tokens = config.data.max_tokens  # goes into the exported config.json
    batches = TrainingBatches(
        train,
        batch_size=config.data.batch_size,
        token_budget=config.data.micro_batch_tokens,
        micro_batches=None if given == "auto" else given,
        noise_width=model.family.noise_width,
        draws=phase.settings.draws,
        deletion=phase.settings.deletion,
        seed=phase.seed,
        rank=world.rank,
        world_size=world.size,
        pad_id=model.config.pad_token_id,
    )
    engine = PhaseEngine(model, world, phase, resolved, origin=origin)
    resolved_file = Path(config.output_dir) / f"ds_config.phase{phase.number}.json"
    world.run_on_rank0(lambda: write_json(resolved_file, resolved))
    reporter.say(
        f"phase {phase.number}: {phase.steps:,} steps of {config.data.batch_size} sentences, ZeRO "
        f"{engine.zero_stage}, {engine.precision}; its ds_config is {resolved_file}"
    )
    reporter.detail(json.dumps(resolved, indent=2))
    return engine, batches


def _save_tokenizer(data: Prepared) -> Callable[[Path], None]:
    def save(directory: Path) -> None:
        data.tokenizer.save_pretrained(directory)

    return save


def _write_down(
    config: RunConfig,
    raw: dict[str, Any],
    data: Prepared,
    sentences: dict[str, Any],
    out: Path,
) -> None:
    """Puts configuration, tokenizer and what tells the sentences from others into the
    output directory."""
    write_json(out / "ds_config.json", raw)
    write_json(out / run_directory.DATA, sentences)
    if not (out / "tokenizer").is_dir():
        data.tokenizer.save_pretrained(out / ".tokenizer.tmp")
        replace_directory(out / ".tokenizer.tmp", out / "tokenizer")
    # a copy: the configuration stays the same on all ranks
    written = dataclasses.replace(config, ds_config=str(out / "ds_config.json"))
    write_text(out / "config.yaml", configuration.to_yaml(written))


def _say_finished(config: RunConfig, reporter: Reporter) -> None:
    """The results of a finished run and where everything lies."""
    out = Path(config.output_dir)
    if config.phase == "1":
        reporter.say(
            f"phase 1 is finished: its weights are in {out / 'phase1' / 'model'}; go on with "
            f"--phase 2"
        )
        return
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["test"]
    reporter.say(
        "\n".join(
            (
                result_table("test", metrics),
                f"model       {out / 'model'}  (T5VAE.from_pretrained; its README.md is the "
                f"model card)",
                f"metrics     {out / 'metrics.json'}, {out / 'metrics.jsonl'}",
                f"TensorBoard tensorboard --logdir {out / 'tensorboard'}",
            )
        )
    )


def end_process(code: int) -> NoReturn:
    """Ends this process with everything flushed, without taking the interpreter down.

    That takes a while, and now and then it aborts (three of about a hundred small
    ZeRO-3 runs, torch 2.13, on CPU): a thread that is in C++ just then ends the process
    with "terminate called", and a finished run with 134.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main())
