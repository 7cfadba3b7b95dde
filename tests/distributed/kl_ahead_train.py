"""dsvae/train.py that compares, in every step, the KL ahead of the first backward with
that of the passes that train."""

from dsvae import train
from dsvae.engine.engine import PhaseEngine

kl_ahead, train_step = PhaseEngine._statistics_ahead, PhaseEngine.train_step
ahead = []


def remember(self, index, batches, penalty):
    found = kl_ahead(self, index, batches, penalty)
    ahead.append(found.clone())  # it is summed over the ranks in place
    return found


def compare(self, index, step, penalty):
    before = len(ahead)
    sums = train_step(self, index, step, penalty)
    if len(ahead) > before:
        error = float((ahead[-1] - sums.statistics).abs().max())
        print(
            f"rank {self.world.rank}: {len(step.micro_batches)} micro-batches, largest "
            f"difference {error}",
            flush=True,
        )
    return sums


PhaseEngine._statistics_ahead, PhaseEngine.train_step = remember, compare
train.end_process(train.main())
