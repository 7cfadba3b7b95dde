"""The real command on the emulated GPU in every variant, by hand: seconds per case.

    python tests/emulated_gpu/matrix.py [--only WORD...] [--ranks 1 2] [--ds_configs zero0 zero3]

In float32, losses are compared with a run on the CPU at ZeRO 0 with as many ranks; in 16
bits, a run must end with finite losses. Prints a line per case, and exits with 1 if one
is wrong.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

COLUMNS = {
    "label": ("--data.label_column", "label"),
    "tags": ("--data.tags_column", "tags"),
    "condition": ("--data.condition_column", "c"),
}
# Gradients of adapters are near zero at first, and AdamW divides them by their own size:
# with an eps of 1e-8, rounding decides the direction.
LARGE_EPS = ("--phase1.adam_eps", "1e-4", "--phase2.adam_eps", "1e-4")
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
    "kl target": (
        *("--phase2.beta.kind", "target", "--phase2.beta.target", "2"),
        *("--phase2.free_bits", "0"),
    ),
    "draws": ("--phase2.draws", "3"),
    "frozen decoder": ("--phase1.freeze_decoder", "true"),
    "checkpointing": ("--model.gradient_checkpointing", "true", "--model.dropout", "0.1"),
    "dropout": ("--model.dropout", "0.1"),
    "micro-batches": ("--data.micro_batch_tokens", "128"),
    "lora": ("--model", "T5", "--model.lora.rank", "2", *LARGE_EPS),
    "t5gemma": ("--model", "T5GEMMA", "--injection", "cross"),
    "t5gemma lora": ("--model", "T5GEMMA", "--injection", "cross", "--model.lora.rank", "2"),
    "classes": ("--train_file", "RECORDS", *COLUMNS["label"]),
    "tags": ("--train_file", "RECORDS", *COLUMNS["tags"]),
    "condition": ("--train_file", "RECORDS", *COLUMNS["condition"]),
    "condition and heads": ("--train_file", "RECORDS", *sum(COLUMNS.values(), ())),
    "clusters": ("--train_file", "RECORDS", *COLUMNS["condition"], "--model.clusters", "4"),
    "scaled rate": ("--phase1.lr_scale", "rms", "--phase2.lr_scale", "rms"),
    "bf16": ("--precision", "bf16"),
    "fp16": ("--precision", "fp16"),
}
CONFIGS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


def write_records(path: Path) -> None:
    """Sentences with a class, tags and a condition; some lack a class or tags."""
    draw, tags = random.Random(0), {"cat": "B-X", "dog": "B-X", "small": "I-X", "big": "I-X"}
    words = ["the", "a", "cat", "dog", "bird", "sees", "hears", "old", "new", "small", "big"]
    with path.open("w") as file:
        for i in range(300):
            drawn = draw.choices(words, k=draw.randint(2, 8))
            record = {"text": " ".join(drawn), "c": ("one", "two words")[i % 2]}
            record["label"] = None if i % 4 == 0 else ("no", "yes")["cat" in drawn]
            record["tags"] = None if i % 5 == 0 else [tags.get(word, "O") for word in drawn]
            file.write(json.dumps(record) + "\n")


def in_fp16(config: Path, directory: Path) -> Path:
    """A copy of a ds_config for fp16, with the scaling of fp16.json. It starts at 2^8: from
    2^16 the loss does not fall within the few steps of a case."""
    found = json.loads(config.read_text())
    for section in ("bf16", "data_types"):
        found.pop(section, None)
    found["fp16"] = json.loads(config.with_name("fp16.json").read_text())["fp16"]
    found["fp16"]["initial_scale_power"] = 8
    path = directory / "fp16.json"
    path.write_text(json.dumps(found))
    return path


class Matrix:
    """Cases that share a directory: the data, and a run on the CPU per variant and number
    of ranks."""

    def __init__(self, root: Path) -> None:
        import yaml
        from launch import TINY
        from small_models import make_t5, make_t5gemma, small_tokenizer

        from dsvae.config import DataConfig
        from dsvae.data.corpora import load_corpus
        from dsvae.data.sources import source_of

        self.root, self.base = root, root / "tiny.yaml"
        self.base.write_text(
            yaml.safe_dump({**TINY, "data": {**TINY["data"], "cache_dir": str(root)}})
        )
        t5, gemma, records = root / "t5", root / "t5gemma", root / "records.jsonl"
        write_records(records)
        t5.mkdir()
        make_t5("t5 v1.1", t5)
        make_t5gemma(gemma)
        corpus = load_corpus(source_of(DataConfig(builtin_size=300)), 0, gemma)
        for model in (t5, gemma):
            small_tokenizer(corpus.splits["train"]["text"]).save_pretrained(model)
        self.files = {"T5": str(t5), "T5GEMMA": str(gemma), "RECORDS": str(records)}
        self.on_cpu: dict[tuple[str, int], list[float]] = {}

    def losses(self, given: tuple, ds_config: Path, ranks: int, **script: Path) -> list[float]:
        from launch import rows, train

        words = [self.files.get(word, word) for word in given]
        with tempfile.TemporaryDirectory(dir=self.root) as out:
            command = ("--config", self.base, "--ds_config", ds_config, *words)
            train(*command, "--output_dir", out, ranks=ranks, **script)
            return [row["loss"] for row in rows(Path(out))]

    def case(self, name: str, config: str, ranks: int) -> str:
        """Runs a case; what was seen."""
        from launch import CONFIGS as FILES

        given, ds_config = VARIANTS[name], FILES / f"{config}.json"
        if name == "fp16":
            if config == "zero0":
                return "refused by dsvae: skipped"
            ds_config = in_fp16(ds_config, self.root)
        sixteen = name in ("bf16", "fp16")
        given += () if sixteen else ("--precision", "fp32")
        found = self.losses(given, ds_config, ranks, script=HERE / "train.py")
        if sixteen:
            assert all(map(math.isfinite, found)), f"losses {found}"
            return f"finite, {found[0]:.3f} to {found[-1]:.3f}"
        if (name, ranks) not in self.on_cpu:
            self.on_cpu[name, ranks] = self.losses(given, FILES / "zero0.json", ranks)
        expected = self.on_cpu[name, ranks]
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        assert worst < 1e-5, f"losses differ by {worst:.1e}"
        return f"{worst:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="variants with these names", choices=VARIANTS)
    parser.add_argument("--ds_configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        matrix = Matrix(Path(directory))
        for name in args.only or VARIANTS:
            for ranks in args.ranks:
                for config in args.ds_configs:
                    start = time.monotonic()
                    try:
                        seen = matrix.case(name, config, ranks)
                    except AssertionError as error:
                        wrong += 1
                        lines = [line for line in str(error).splitlines() if "rror" in line]
                        seen = f"WRONG: {lines[-1][:300] if lines else str(error)[-300:]}"
                    took = time.monotonic() - start
                    print(f"{name}, {config}, {ranks} rank(s): {seen} ({took:.0f} s)", flush=True)
    sys.exit(f"{wrong} wrong" if wrong else 0)


if __name__ == "__main__":
    main()
