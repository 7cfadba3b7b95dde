"""The real command on the emulated GPU in every variant, by hand: minutes per variant.

    python tests/emulated_gpu/matrix.py [--only WORD] [--ranks 1 2] [--ds_configs zero0 zero3]

In float32, losses are compared with a run on the CPU; in 16 bits, a run must end with
finite losses. Prints a line per run and, at the end, the errors.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

LORA = ("--model.lora.rank", "2")
VARIANTS = {
    "gaussian memory": (),
    "embedding": ("--injection", "embedding"),
    "both": ("--injection", "both"),
    "no latent": ("--injection", "none"),
    "cross": ("--injection", "cross"),
    "spike_slab": ("--model.family", "spike_slab"),
    "categorical": ("--model.family", "categorical", "--phase2.total_correlation", "0.1"),
    "attention pooling": ("--pooling", "attention"),
    "free bits per sentence": ("--phase2.free_bits_mode", "sentence"),
    "kl target": ("--phase2.beta.kind", "target", "--phase2.beta.target", "2"),
    "draws": ("--phase2.draws", "3"),
    "frozen decoder": ("--phase1.freeze_decoder", "true"),
    "checkpointing": ("--model.gradient_checkpointing", "true", "--model.dropout", "0.1"),
    "dropout": ("--model.dropout", "0.1"),
    "micro-batches": ("--data.micro_batch_tokens", "128"),
    "lora": LORA,
    "t5gemma": ("--model", "t5gemma", "--injection", "cross"),
    "bf16": ("--precision", "bf16"),
    "fp16": ("--precision", "fp16"),
}
CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def losses(directory: Path) -> list[float]:
    from launch import rows

    return [row["loss"] for row in rows(directory)]


def compare(name: str, given: tuple, config: str, ranks: int, root: Path, base: Path) -> str:
    """Runs a variant; what is wrong with it, or an empty string."""
    from launch import CONFIGS as FILES
    from launch import train

    sixteen = "--precision" in given
    if name == "fp16":
        config = "fp16" if config == "zero2" else ""
        if not config:
            return "skipped"
    command = ("--config", base, "--ds_config", FILES / f"{config}.json", *given)
    command += () if sixteen else ("--precision", "fp32")
    try:
        train(*command, "--output_dir", root / "gpu", ranks=ranks, script=HERE / "train.py")
        found = losses(root / "gpu")
        if sixteen:
            return "" if all(map(math.isfinite, found)) else f"losses {found}"
        train(*command, "--output_dir", root / "cpu", ranks=ranks)
        expected = losses(root / "cpu")
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if "rror" in line]
        return lines[-1][:300] if lines else str(error)[-300:]
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    return "" if worst < 1e-5 else f"losses differ by {worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="variants whose name has this word")
    parser.add_argument("--ds_configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    import yaml
    from launch import TINY
    from small_models import make_t5gemma, small_tokenizer

    from dsvae.config import DataConfig
    from dsvae.data.corpora import load_corpus
    from dsvae.data.sources import source_of

    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        base = work / "tiny.yaml"
        base.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "cache_dir": directory}}))
        gemma = work / "t5gemma"
        make_t5gemma(gemma)
        corpus = load_corpus(source_of(DataConfig(builtin_size=300)), 0, gemma)
        small_tokenizer(corpus.splits["train"]["text"]).save_pretrained(gemma)
        for name, given in VARIANTS.items():
            if args.only not in name:
                continue
            given = tuple(str(gemma) if word == "t5gemma" else word for word in given)
            for config in args.ds_configs:
                for ranks in args.ranks:
                    with tempfile.TemporaryDirectory(dir=work) as root:
                        problem = compare(name, given, config, ranks, Path(root), base)
                    wrong += problem not in ("", "skipped")
                    print(f"{name}, {config}, {ranks} rank(s): {problem or 'ok'}", flush=True)
    sys.exit(f"{wrong} wrong" if wrong else 0)


if __name__ == "__main__":
    main()
