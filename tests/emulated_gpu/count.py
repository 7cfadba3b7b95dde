"""What one optimizer step costs a GPU: kernels, waits of the host, copies, memory, for each
ds_config, counted on the emulated one.

    python tests/emulated_gpu/count.py --layers 12 --micro_batches 1

A kernel is an operation that CUDA launches kernels for, at least one: an operation on a
list of tensors and attention count as one. The counts depend on the layers and not on
the widths, so the model is narrow by default.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import emulated

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
KINDS = ("kernels", "wait", "copies", "bytes", "collectives")


def count(
    world,
    name: str,
    layers: int = 12,
    micro_batches: int = 1,
    precision: str = "bf16",
    width: int = 32,
    vocab_size: int = 128,
    detail: bool = False,
) -> dict:
    """The counts of one step in steady state.

    Args:
        name: of a file in ds_configs; `bare`: a bare loop of torch.
        detail: whether to say which operations, and which lines have waited.
    """
    import deepspeed
    import sides
    import torch

    import dsvae
    from dsvae.engine.process_group import lend_to_deepspeed
    from dsvae.modeling.t5_vae import T5VAE
    from dsvae.objective.elbo import Penalty
    from dsvae.parallel.stopping import Stopping

    t5 = {
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
    }
    bare = name == "bare"
    job = sides.Job(
        t5,
        side="bare" if bare else "dsvae",
        precision=precision,
        ds_config="zero1" if bare else name,
        batch_size=4 * micro_batches,
        micro_batch_tokens=32,
        max_tokens=8,  # so all sentences are as long, and each step has as many micro-batches
    )
    lend_to_deepspeed(world)
    split = sides.random_split(job, 40 * micro_batches)
    torch.manual_seed(0)
    model = T5VAE(job.model())
    if bare:
        step = sides.make_side(job, model, split, world)
    else:
        engine, batches = (
            sides.training_engine(job, model, world),
            sides.training_batches(job, split),
        )

        def step(index, _):
            engine.train_step(index, batches.step(index), Penalty(sides.BETA))
            Stopping().agreed(world)

    for index in range(2):  # AdamW's states, DeepSpeed's traces
        step(index, 1)
    torch.accelerator.reset_peak_memory_stats()
    owners = (str(Path(dsvae.__file__).parent), str(Path(deepspeed.__file__).parent))
    with emulated.counting(owners if detail else ()) as counts:
        step(2, 1)
    found = {"ds_config": name, **{kind: emulated.total(counts, kind) for kind in KINDS}}
    found["peak_bytes"] = torch.accelerator.max_memory_allocated()
    if not bare:
        engine.close()
        del engine, batches, step  # the next one measures its own memory
        gc.collect()
    return found | ({"detail": dict(counts)} if detail else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ds_configs", nargs="+", default=["bare", "zero0", "zero1", "zero2", "zero3"]
    )
    parser.add_argument("--layers", type=int, default=12, help="of each stack")
    parser.add_argument("--micro_batches", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=128)
    parser.add_argument("--detail", action="store_true", help="operations and lines that wait")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    names, as_json = given.pop("ds_configs"), given.pop("json")
    emulated.install()
    from deepspeed.utils import logger

    from dsvae.parallel.world import joined

    logger.setLevel("WARNING")
    with joined() as world:  # one for all: DeepSpeed keeps its groups for the life of a process
        table(world, names, as_json, **given)


def table(world, names: list[str], as_json: bool, **given) -> None:
    print("| ds_config | kernels | waits | copies | bytes copied | collectives | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        found = count(world, name, **given)
        if as_json:
            print(json.dumps(found))
            continue
        peak = found["peak_bytes"] / 1e6
        print(
            f"| {name} | {' | '.join(f'{found[kind]:,}' for kind in KINDS)} | {peak:,.1f} |",
            flush=True,
        )
        for key, number in sorted(found.get("detail", {}).items(), key=lambda item: -item[1]):
            print(f"    {number:8,} {key}")


if __name__ == "__main__":
    main()
