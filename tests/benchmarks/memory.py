"""Peak resident memory of a rank at each ZeRO stage, of the real command on a T5 from
its configuration.

    python tests/benchmarks/memory.py [--configs zero0,zero1,FILE.json] [--ranks 2]
    [--precision bf16]

Read from VmHWM of every rank's process: everything counts, the Python and its libraries
too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from launch import CONFIGS, start

# 111 M parameters
T5_100M = "{d_model: 768, d_kv: 64, d_ff: 2048, num_layers: 10, num_heads: 12, dropout_rate: 0.0}"


def peak_mib(pid: int) -> float:
    """VmHWM of a live process in MiB, 0 if it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", default="zero0,zero1,zero2,zero3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args()
    cache = tempfile.mkdtemp()
    for name in args.configs.split(","):
        out = tempfile.mkdtemp()
        run = start(
            "--ds_config",
            name if name.endswith(".json") else CONFIGS / f"{name}.json",
            "--precision",
            args.precision,
            "--output_dir",
            f"{out}/run",
            "--data.cache_dir",
            cache,
            "--data.builtin_size",
            "400",
            "--model.t5",
            T5_100M,
            "--model.vocab_size",
            "500",
            "--phase",
            "2",
            "--phase2.steps",
            "6",
            "--data.batch_size",
            "16",
            "--eval.shown",
            "0",
            ranks=args.ranks,
            launcher="ranks",  # forked ones would share the memory of what they import
        )
        peaks = [0.0] * args.ranks
        while any(process.poll() is None for process in run.processes):
            peaks = [
                max(peak, peak_mib(p.pid)) for peak, p in zip(peaks, run.processes, strict=True)
            ]
            time.sleep(0.02)
        code = run.wait(10)
        print(
            json.dumps({"config": name, "exit": code, "peak_mib": [round(peak) for peak in peaks]}),
            flush=True,
        )


if __name__ == "__main__":
    main()
