"""dsvae/train.py that compares, in every step, the KL ahead of the first backward with
that of the passes that train."""

from dsvae import train
from dsvae.engine.engine import PhaseEngine

kl_ahead, train_step = PhaseEngine._kl_ahead, PhaseEngine.train_step
ahead = []


def remember(self, index, batches):
    found = kl_ahead(self, index, batches)
    ahead.append(found.clone())  # it is summed over the ranks in place
    return found


def compare(self, index, step, beta):
    before = len(ahead)
    sums = train_step(self, index, step, beta)
    if len(ahead) > before:
        error = float((ahead[-1] - sums.kl).abs().max())
        print(
            f"rank {self.world.rank}: {len(step.micro_batches)} micro-batches, largest "
            f"difference {error}",
            flush=True,
        )
    return sums


PhaseEngine._kl_ahead, PhaseEngine.train_step = remember, compare
train.leave(train.main())
