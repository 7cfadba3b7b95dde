"""Peak resident memory of every rank while a sharded safetensors T5 is loaded, trained
for a step and exported.

    python tests/benchmarks/loading.py [--config zero3] [--precision fp32] [--ranks 2]
    [--size large] [--load_only]

Three figures a rank and part, in MiB: `peak` is VmHWM, which counts every page of a
file that is mapped; `anonymous` is the highest RssAnon seen (every 5 ms), memory that
no file gives back; `base` is resident before the model, with all libraries imported and
the process group joined. VmHWM is set back between the parts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch import CONFIGS, environment, free_port

SIZES = {
    # t5-large: 738 M parameters
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
    # 167 M
    "medium": {
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "vocab_size": 8000,
    },
}
MIB = 2**20


def save_t5(directory: Path, size: str, max_shard_size: str) -> None:
    """A T5 of that size from its configuration, in shards, with random weights and a
    small tokenizer beside it."""
    from transformers import T5Config, T5ForConditionalGeneration

    from dsvae.data.tokenizer_training import train_tokenizer

    config = T5Config(
        decoder_start_token_id=0, dropout_rate=0.0, **{"vocab_size": 32128, **SIZES[size]}
    )
    T5ForConditionalGeneration(config).save_pretrained(directory, max_shard_size=max_shard_size)
    train_tokenizer(["a small cat sees the old dog", "an old dog sees a cat"], 296).save_pretrained(
        directory
    )


def measure(
    model: Path,
    ds_config: Path,
    *,
    ranks: int = 2,
    precision: str = "fp32",
    freeze: bool = False,
    load_only: bool,
    timeout: float,
) -> list[dict]:
    """The figures of every rank; the ranks are processes of their own."""
    scratch = tempfile.TemporaryDirectory()
    out = Path(scratch.name)
    port, processes = str(free_port()), []
    options = [model, ds_config, precision, int(freeze), int(load_only), out]
    for rank in range(ranks):
        more = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *map(str, options)],
                env=environment(**more, MASTER_PORT=port),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    end = time.monotonic() + timeout
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(1.0, end - time.monotonic()))
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    with scratch:
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


class Peaks:
    """The peaks of this process since they were last read."""

    def __init__(self) -> None:
        self._anonymous = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()
        self.read()

    def read(self) -> dict[str, float]:
        with self._lock:
            found = {
                "peak": _status("VmHWM"),
                "anonymous": max(self._anonymous, _status("RssAnon")),
            }
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
            self._anonymous = 0.0
        return found

    def _watch(self) -> None:
        while True:
            with self._lock:
                self._anonymous = max(self._anonymous, _status("RssAnon"))
            time.sleep(0.005)


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def worker(
    model: str, ds_config: str, precision: str, freeze: str, load_only: str, out: str
) -> None:
    """One rank."""
    import torch

    from dsvae.config import ModelConfig, Phase1Config, RunConfig
    from dsvae.data.batches import MicroBatch, Step
    from dsvae.data.tokenization import load_tokenizer
    from dsvae.engine import ds_config as ds_configs
    from dsvae.engine import weights
    from dsvae.engine.build import build_model
    from dsvae.engine.engine import PhaseEngine
    from dsvae.engine.process_group import lend_to_deepspeed
    from dsvae.objective.elbo import Penalty
    from dsvae.parallel.world import join, leave
    from dsvae.phases import Phase

    world = join()
    lend_to_deepspeed(world)
    config = RunConfig(
        phase1=Phase1Config(lr=1e-4, freeze_decoder=bool(int(freeze))),
        model=ModelConfig(name=model, gradient_checkpointing=True),
    )
    resolved = ds_configs.resolve(
        ds_configs.load(ds_config),
        phase=config.phase1,
        precision=precision,
        batch_size=2 * world.size,
        micro_batches=1,
        world_size=world.size,
        bf16_supported=True,
        fp16_supported=False,
    )
    tokenizer = load_tokenizer(model)
    world.barrier()
    found: dict = {"base": _status("VmRSS")}
    peaks = Peaks()
    start = time.perf_counter()
    built, origin = build_model(ModelConfig(name=model), tokenizer, None, 0, world, resolved)
    found["load"] = {**peaks.read(), "seconds": time.perf_counter() - start}
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in built.parameters())
    if not int(load_only):
        engine = PhaseEngine(
            built,
            world,
            Phase(1, config, 0),
            resolved,
            origin=origin,
        )
        found["initialize"] = peaks.read()
        ids = torch.tensor([[3, 4, 5, 6, 1], [5, 4, 3, 7, 1]])
        batch = MicroBatch(
            ids, torch.ones_like(ids), ids, torch.zeros(2, 1, 32), torch.ones(2), ids[:, 0].numpy()
        )
        engine.train_step(0, Step([batch], 2 * world.size, 10 * world.size), Penalty(1.0, 0.5))
        found["step"] = peaks.read()
        directory = Path(out) / "model"
        weights.export(engine.module, engine.origin, world, directory, lambda _: None)
        found["export"] = peaks.read()
        if world.is_main:
            found["shards"] = len(list(directory.glob("*.safetensors")))
    (Path(out) / f"{world.rank}.json").write_text(json.dumps(found))
    world.barrier()
    leave(world)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="zero3")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", default="large", choices=SIZES)
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--load_only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_t5(Path(directory), args.size, "500MB")
        found = measure(
            Path(directory),
            CONFIGS / f"{args.config}.json",
            ranks=args.ranks,
            precision=args.precision,
            freeze=args.freeze,
            load_only=args.load_only,
            timeout=900,
        )
    for rank, figures in enumerate(found):
        print(
            json.dumps(
                {"config": args.config, "precision": args.precision, "rank": rank, **figures}
            ),
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
