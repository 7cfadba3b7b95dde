"""dsvae/train.py with a fault built in, for the tests of faults. The fault and where it
strikes come from the environment.

FAULT=hang RANK STEP: the rank's main thread sleeps at that optimizer step (from 0, of
its phase), the process lives. FAULT=device RANK STEP: the same with a stand-in for
GPUs: the others' devices wait for the rank's, and their hosts for those. FAULT=stand
RANK STEP: the rank's process stands still there (SIGSTOP). FAULT=error RANK STEP:
the rank lacks memory at that optimizer step, as torch says it. FAULT=model
RANK, refuse RANK, stop RANK: while its engine is built, the rank finds no model in the
directory MODEL, meets a UserError in the midst of it, or stands still (SIGSTOP).
FAULT=slow RANK: the rank takes SECONDS for the first of several files of an export, for
all of its tensors, and for loading a checkpoint. FAULT=non_finite RANK STEP [STEP ...]:
what the rank's sentences cost is not a number at these steps. FAULT=told RANK BATCH:
the rank gets a SIGTERM at that batch (from 1) of the final evaluation. FAULT=pause RANK:
all ranks wait before the next step once the file WHEN is there, until one of them gets
a signal or the file UNTIL is there.
WEIGHTS=DIRECTORY: the whole model's checksum after every optimizer step goes into
DIRECTORY/phase.step.
"""

import dataclasses
import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import torch

from dsvae import train
from dsvae.engine import build, weights
from dsvae.engine.engine import PhaseEngine
from dsvae.engine.model_directory import ModelDirectory
from dsvae.engine.weights import full_weights
from dsvae.errors import UserError
from dsvae.inference.kept import Kept
from dsvae.modeling.vocabulary import VocabularyHead
from dsvae.parallel import world
from dsvae.parallel.stopping import Stopping
from dsvae.parallel.watchdog import Watchdog

kind, rank, *numbers = os.environ["FAULT"].split()
steps = [int(number) for number in numbers]
mine = int(os.environ["RANK"]) == int(rank)
current = {"step": -1}
head = VocabularyHead.forward
train_step = PhaseEngine.train_step
flush, read_weight = ModelDirectory._flush, weights.safe_get_full_fp32_param
make_engine, find_origin = PhaseEngine.__init__, build.find_origin


def faulty_head(self, *given):
    out = head(self, *given)
    if mine and kind == "non_finite" and current["step"] in steps:
        return tuple(each * float("nan") for each in out)
    return out


def observed_step(self, index, step, penalty):
    current["step"] = index
    if mine and kind == "hang" and index in steps:
        time.sleep(600)
    if mine and kind == "stand" and index in steps:
        os.kill(os.getpid(), signal.SIGSTOP)
    while kind == "pause" and not self.world.max(torch.tensor(int(not paused()))):
        time.sleep(0.01)
    if kind == "device" and index in steps:
        if mine:
            time.sleep(600)
        device.clear()
        device.wait()  # no line of torch.distributed's or DeepSpeed's
    if mine and kind == "error" and index in steps:
        raise RuntimeError("out of memory")
    sums = train_step(self, index, step, penalty)
    if directory := os.environ.get("WEIGHTS"):
        digest = hashlib.sha256()
        for name, tensor in full_weights(self.module, self.origin, self.world):
            if tensor is not None:
                digest.update(name.encode() + tensor.numpy().tobytes())
        if self.world.is_main:
            number = len(list(Path(directory).iterdir()))
            (Path(directory) / f"{number:03d}").write_text(digest.hexdigest())
    return sums


told = threading.Event()
handle = Stopping._handle


def noted(self, number, frame):
    told.set()
    handle(self, number, frame)


def paused():
    until = os.environ.get("UNTIL", "")
    return os.path.exists(os.environ["WHEN"]) and not told.is_set() and not os.path.exists(until)


device = threading.Event()  # set: it has nothing to do
device.set()


def with_device(store, rank, size, timeout, synchronize):
    return Watchdog(store, rank, size, timeout, device.wait)


def observed_engine(*args, **kwargs):
    if mine and kind == "refuse":
        raise UserError("this rank alone does not like it")
    if mine and kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    make_engine(*args, **kwargs)
    load_checkpoint = args[0].deepspeed.load_checkpoint
    args[0].deepspeed.load_checkpoint = lambda *args, **kwargs: (
        slow() or load_checkpoint(*args, **kwargs)
    )


def slow(parts=1):
    if mine and kind == "slow":
        time.sleep(float(os.environ["SECONDS"]) / parts)


def slow_flush(self):
    if not self._shards:
        slow()
    flush(self)


def slow_weight(parameter):
    slow(parts=20)  # this model has a few more
    return read_weight(parameter)


def elsewhere(settings, *args):
    if mine and kind == "model":
        settings = dataclasses.replace(settings, name=os.environ["MODEL"])
    return find_origin(settings, *args)


class ToldWhileEvaluating(Kept):
    """Asks after every batch of the final evaluation whether to stop."""

    def __init__(self, root, identity, world, stop):
        super().__init__(root, identity, world, lambda: self.tell() or stop())
        self.batches = 0

    def tell(self):
        self.batches += 1
        if mine and self.batches == steps[0]:
            os.kill(os.getpid(), signal.SIGTERM)


if kind == "told":
    train.Kept = ToldWhileEvaluating
if kind == "device":
    world.Watchdog = with_device
if kind == "slow":
    weights.export.__defaults__ = (20_000,)  # bytes of a file
Stopping._handle = noted
ModelDirectory._flush = slow_flush
weights.safe_get_full_fp32_param = slow_weight
PhaseEngine.__init__ = observed_engine
build.find_origin = elsewhere
VocabularyHead.forward = faulty_head
PhaseEngine.train_step = observed_step
train.end_process(train.main())
