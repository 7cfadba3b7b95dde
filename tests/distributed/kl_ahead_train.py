"""dsvae/train.py that compares, in every step, the KL ahead of the first backward with
that of the passes that train."""

from dsvae import train
from dsvae.engine.engine import PhaseEngine
from dsvae.objective.elbo import pack

means_ahead, train_step = PhaseEngine._means_ahead, PhaseEngine.train_step
ahead = []


def remember(self, *arguments):
    ahead.append(means_ahead(self, *arguments))
    return ahead[-1]


def compare(self, index, step, penalty):
    before = len(ahead)
    sums = train_step(self, index, step, penalty)
    if len(ahead) > before:
        found = self.world.sum(pack(sums.statistics).clone()) / step.sentences
        error = float((pack(ahead[-1]) - found).abs().max())
        print(
            f"rank {self.world.rank}: {len(step.micro_batches)} micro-batches, largest "
            f"difference {error}",
            flush=True,
        )
    return sums


PhaseEngine._means_ahead, PhaseEngine.train_step = remember, compare
train.end_process(train.main())
