"""The ablation of speculative sampling: train on the mean of K draws of z instead of the
best of them (Sato et al. 2021, "Monte Carlo").

    python tests/benchmarks/monte_carlo_draws.py K --ds_config ... (the flags of train.py)

The mean of K draws of a Gaussian posterior is one draw with the noise divided by
sqrt(K), in training alone. Evaluation draws z as ever.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from torch import Tensor

from dsvae.data.batches import MicroBatch
from dsvae.engine.engine import PhaseEngine
from dsvae.failures import end_process
from dsvae.train import main

if __name__ == "__main__":
    count, choose_noise = int(sys.argv.pop(1)), PhaseEngine._choose_noise

    def mean_of_draws(engine: PhaseEngine, batch: MicroBatch) -> Tensor:
        return choose_noise(engine, batch) / math.sqrt(count)

    PhaseEngine._choose_noise = mean_of_draws  # type: ignore[method-assign]
    end_process(main())
