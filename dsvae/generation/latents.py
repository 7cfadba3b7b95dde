"""The latents of texts: a directory of shards with a manifest, written by any number of
ranks, and read again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from dsvae import pretrained
from dsvae.data.records import Record
from dsvae.errors import UserError, first_line
from dsvae.files import make_place, make_writable, whole_directory, write_json
from dsvae.generation.latents_file import (
    Strings,
    Tensors,
    read_shard,
    sha256_of,
    write_shard,
)
from dsvae.generation.options import LatentFormat, LatentType
from dsvae.generation.reading import WINDOW, no_sentences, read_records
from dsvae.generation.sentence_vae import SentenceVAE, find_device
from dsvae.modeling.families import Distribution
from dsvae.modeling.weight_source import SafetensorsFiles
from dsvae.parallel.world import World, joined

if TYPE_CHECKING:
    from datasets import Dataset

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANIFEST = "manifest.json"
PARTS = ".parts"
"""What is known of the finished shards while the others are made."""
SHARD_BYTES, SHARD_ROWS = 1 << 27, 1 << 16
"""A shard has at most so many lines, and so many bytes of numbers, unless the user says
how many lines."""


def model_digest(directory: Path) -> str:
    """Returns the SHA-256 of a model's weights, without those that change no latent and no
    text of one."""
    return SafetensorsFiles(str(directory)).digest(("denoiser.", "align_head."))


def write_latents(
    model_dir: str,
    file: str | None,
    text_column: str,
    condition_column: str | None,
    *,
    output: str,
    dtype: LatentType = "float32",
    kind: LatentFormat = "safetensors",
    shard_rows: int | None = None,
    batch_size: int = 128,
    max_tokens: int = 512,
    device: str | None = None,
    precision: pretrained.Precision = "fp32",
) -> dict[str, Any]:
    """Writes the posteriors of the texts of a file to a directory; returns its manifest.
    Under a launcher every process calls it, and the ranks share the work. Collective.

    A shard has the texts of `shard_rows` consecutive lines. Shard i is made by rank i
    modulo the number of ranks, and a second call goes on where the first was interrupted,
    on any number of ranks. What is read of stdin appears whole or not at all.

    Args:
        model_dir, batch_size, max_tokens, device, precision: as of
            `SentenceVAE.from_pretrained`. Several ranks have a device each.
        file, text_column, condition_column: as of `read_records`.
        output: the directory.
        dtype: of all numbers.
        shard_rows: None: as many lines as give a shard of about 128 MiB of numbers, and
            65,536 at most.

    Raises:
        UserError: a model, a file or a place that cannot be used; or the directory has the
            latents of another model, file or setting.
    """
    place, stdin = Path(output).expanduser(), file in (None, "-")
    if dtype == "bf16" and kind == "parquet":
        raise UserError("--kind parquet has no bf16: use --dtype fp16, or safetensors")
    if place.suffix in (".safetensors", ".parquet"):
        raise UserError(f"--output {output} is a directory of shards: leave {place.suffix} out")
    logging.disable_progress_bar()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and stdin:
        raise UserError("several ranks cannot share stdin: give FILE")
    alone = nullcontext(World(0, 0, 1, find_device(device)))
    with joined() if several else alone as world:
        world.run_on_rank0(lambda: make_place(place) if stdin else _check_place(place))
        directory = Path(world.run_on_rank0(lambda: str(pretrained.find_model(model_dir))))
        model, tokenizer = world.run_on_all(
            lambda: pretrained.load(directory, world.device, precision)
        )
        vae = SentenceVAE(model, tokenizer, batch_size=batch_size, max_tokens=max_tokens)
        vae.inputs.check(condition_column is not None)
        rows = shard_rows or _rows_that_fit(vae, dtype)
        identity = {
            "model": world.run_on_rank0(lambda: model_digest(directory)),
            "file": None if stdin else _stamp(Path(str(file)).expanduser()),
            "columns": [text_column, condition_column],
            "settings": [dtype, kind, rows, vae.inputs.max_tokens, precision],
        }
        job = _Job(vae, world, identity, kind, DTYPES[dtype], rows)
        records = read_records(file, text_column, condition_column)
        with whole_directory(place) if stdin else nullcontext(place) as target:
            done = world.run_on_rank0(lambda: _done(target, identity))
            if done is not None:
                return done
            shards = job.encode(records, target)
            world.gather(None)  # all shards are there
            source = "stdin" if stdin else str(file)
            return world.run_on_rank0(lambda: job.finish(target, shards, source, model_dir))


@dataclass(frozen=True)
class _Job:
    """What all shards have in common."""

    vae: SentenceVAE
    world: World
    identity: dict[str, Any]
    kind: LatentFormat
    dtype: torch.dtype
    rows: int

    def encode(self, records: Iterator[Record], place: Path) -> int:
        """Writes this rank's shards that are not there yet; returns how many shards there
        are in all."""
        for number in count():
            own = islice(records, self.rows)
            if (first := next(own, None)) is None:
                return number
            part = place / PARTS / f"{number:05d}.json"
            if number % self.world.size == self.world.rank and not part.is_file():
                self._write(number, [first, *own], place, part)
            else:
                for _ in own:
                    pass
            self.world.heartbeat("encoding")
        raise AssertionError("there is no end of numbers")

    def _write(self, number: int, records: list[Record], place: Path, part: Path) -> None:
        """Writes a shard, and what is known of it."""
        before = dataclasses.asdict(self.vae.counts)
        batches: list[Tensors] = []
        strings: Strings = {"text": []}
        sums: Tensor | None = None
        for lines, posterior, prior in self.vae.latents_stream(records):
            numbers = torch.tensor([number * self.rows + line.line for line in lines])
            batches.append({"line": numbers} | self._cast(_rows(posterior, prior)))
            strings["text"] += [line.text for line in lines]
            if lines[0].condition is not None:
                strings.setdefault("condition", []).extend(line.condition or "" for line in lines)
            found = _sums(posterior)
            sums = found if sums is None else sums + found
            self.world.heartbeat("encoding")
        known: dict[str, Any] = {"identity": self.identity, "shard": None}
        part.parent.mkdir(parents=True, exist_ok=True)
        if batches:
            tensors = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
            file = place / f"{number:05d}.{self.kind}"
            write_shard(file, tensors, strings, self.kind)
            known["shard"] = {
                "file": file.name,
                "rows": len(tensors["line"]),
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
            }
            known["tensors"] = {name: list(each.shape[1:]) for name, each in tensors.items()}
            known["strings"] = list(strings)
            known["sums"] = sums.tolist() if sums is not None else None
        after = dataclasses.asdict(self.vae.counts)
        known["counts"] = {name: after[name] - before[name] for name in before}
        write_json(part, known)

    def _cast(self, tensors: Tensors) -> Tensors:
        return {
            name: each.to(self.dtype) if each.is_floating_point() else each
            for name, each in tensors.items()
        }

    def finish(self, place: Path, shards: int, source: str, model_dir: str) -> dict[str, Any]:
        """Writes the manifest; returns it."""
        kept: dict[str, Any] = {}
        files, counts = [], dict.fromkeys(dataclasses.asdict(self.vae.counts), 0)
        sums: Tensor | None = None
        for number in range(shards):
            known = json.loads((place / PARTS / f"{number:05d}.json").read_text())
            counts = {name: counts[name] + known["counts"][name] for name in counts}
            if known["shard"]:
                kept = known
                files.append(known["shard"])
                found = torch.tensor(known["sums"], dtype=torch.float64)
                sums = found if sums is None else sums + found
        if sums is None:
            shutil.rmtree(place, ignore_errors=True)
            raise no_sentences(source)
        seen, total, squares = sums
        mean = total / seen.clamp(min=1)
        std = (squares / seen.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        config, shape = self.vae.model.config, (self.vae.model.config.latent_vectors, -1)
        if config.latent_vectors > 1:
            mean, std = mean.view(shape), std.view(shape)
        manifest = {
            "dsvae": version("dsvae"),
            "model": model_dir,
            "source": source,
            "family": config.family,
            "latent_vectors": config.latent_vectors,
            "latent_dim": config.latent_dim,
            "normalized": False,
            "rows": sum(each["rows"] for each in files),
            "counts": counts,
            "tensors": kept["tensors"],
            "strings": kept["strings"],
            "normalizer": {"mean": mean.tolist(), "std": std.tolist()},
            "shards": files,
            "identity": self.identity,
        }
        write_json(place / MANIFEST, manifest)
        shutil.rmtree(place / PARTS, ignore_errors=True)
        return manifest


def _rows(posterior: Distribution, prior: Distribution | None) -> Tensors:
    """Returns what a batch has in a shard: the parameters by their names, `scale`, and `z`
    if the point that is decoded is not `mean`."""
    found: Tensors = {}
    for prefix, each in (("", posterior), ("prior_", prior)):
        if each is None:
            continue
        named = each.tensors()
        flat = {"scale": each.moments()[1].sqrt()}
        if set(named) - {"mean", "logvar", "valid"}:
            flat["z"] = each.point
        if "valid" in named:
            count = named["valid"].shape[1]
            flat = {name: tensor.unflatten(1, (count, -1)) for name, tensor in flat.items()}
        found |= {f"{prefix}{name}": tensor for name, tensor in {**named, **flat}.items()}
    return found


def _sums(posterior: Distribution) -> Tensor:
    """Returns (3, Z) float64: how many texts have each number of z, and the sums of
    E[z|x] and E[z^2|x]."""
    mean, variance = (each.double() for each in posterior.moments())
    seen = torch.ones_like(mean)
    valid = posterior.tensors().get("valid")
    if valid is not None:
        seen = valid.double().repeat_interleave(mean.shape[1] // valid.shape[1], 1)
    return torch.stack([seen.sum(0), mean.sum(0), (seen * (variance + mean.square())).sum(0)])


def _rows_that_fit(vae: SentenceVAE, dtype: LatentType) -> int:
    """Returns how many lines a shard has."""
    numbers = 2 * vae.model.family.parameter_width + vae.latent_dim
    return max(1, min(SHARD_ROWS, SHARD_BYTES // (numbers * DTYPES[dtype].itemsize)))


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _check_place(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise UserError(f"cannot write {place}: it is a file; name a directory")
    make_writable(place.absolute().parent, "--output")


def _done(place: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the manifest of latents that are complete, or None if some are missing.

    Raises:
        UserError: they are of another model, file or setting, or there is something else.
    """
    manifest = place / MANIFEST
    parts = sorted((place / PARTS).glob("*.json"))
    known = [json.loads(each.read_text()) for each in (manifest, *parts) if each.is_file()]
    if not known:
        if place.is_dir() and any(each.name != PARTS for each in place.iterdir()):
            raise UserError(f"{place} already exists; choose another --output, or remove it")
        return None
    for each in known:
        other = [name for name in identity if each["identity"].get(name) != identity[name]]
        if other:
            raise UserError(
                f"{place} has latents of another {other[0].removesuffix('s')}: choose another "
                f"--output, or remove it"
            )
    return known[0] if manifest.is_file() else None


class Latents:
    """Latents in a directory that `dsvae encode` has written.

    Args:
        directory: of the manifest.

    Raises:
        UserError: there is none, it is not finished, or a shard is missing or cut.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        path = self.directory / MANIFEST
        if not path.is_file():
            begun = (self.directory / PARTS).is_dir()
            raise UserError(
                f"{self.directory} has no {MANIFEST}: "
                + (
                    "repeat dsvae encode, which goes on there"
                    if begun
                    else "dsvae encode makes one"
                )
            )
        try:
            self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            files = [(self.directory / each["file"], each) for each in self.manifest["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); encode again") from error
        for file, known in files:
            if not file.is_file():
                raise UserError(f"{file} is missing: copy it, or encode again")
            if file.stat().st_size != known["bytes"]:
                raise UserError(
                    f"{file} has {file.stat().st_size} bytes, not {known['bytes']}: copy it again, "
                    f"or encode again"
                )
        self._files = files

    def __len__(self) -> int:
        return self.manifest["rows"]

    def shards(self) -> Iterator[tuple[Tensors, Strings]]:
        """Yields the tensors and the texts of each shard.

        Raises:
            UserError: a shard is damaged.
        """
        for file, known in self._files:
            if sha256_of(file) != known["sha256"]:
                raise UserError(f"{file} is damaged: copy it again, or encode again")
            yield read_shard(file, self.manifest["tensors"], self.manifest["strings"])

    def dataset(self) -> Dataset:
        """Returns a data set with a row per text, on disk: `line`, `text`, and the tensors
        as float32 tensors of torch."""
        import datasets

        def kind(name: str, shape: list[int]) -> Any:
            value = {"line": "int64", "valid": "bool"}.get(name, "float32")
            if not shape:
                return datasets.Value(value)
            if len(shape) == 1:
                return datasets.Sequence(datasets.Value(value), length=shape[0])
            return datasets.Array2D(tuple(shape), value)

        columns = {name: kind(name, shape) for name, shape in self.manifest["tensors"].items()}
        columns |= {name: datasets.Value("string") for name in self.manifest["strings"]}
        made = datasets.Dataset.from_generator(
            _examples,
            features=datasets.Features(columns),
            gen_kwargs={
                "directory": str(self.directory),
                "content": " ".join(each["sha256"] for _, each in self._files),
            },
        )
        return made.with_format("torch")


def _examples(directory: str, content: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of `Latents.dataset`.

    Args:
        content: tells the cache of `datasets` what is in the directory.
    """
    for tensors, strings in Latents(directory).shards():
        plain: dict[str, Any] = {
            name: (each.float() if each.is_floating_point() else each).numpy()
            for name, each in tensors.items()
        }
        for row in range(len(plain["line"])):
            yield {name: each[row] for name, each in (plain | strings).items()}


def check_latents(latents: str, normalized: bool) -> bool:
    """Returns whether latents have conditions; arguments and errors as of
    `decode_latents`, before a model is loaded."""
    path = Path(latents).expanduser()
    if not path.is_dir():
        read_latents_file(path)
        return False
    if normalized:
        raise UserError(f"{path} has raw latents: leave --normalized out")
    return "condition" in Latents(path).manifest["strings"]


def decode_latents(
    vae: SentenceVAE, model_dir: str, latents: str, normalized: bool, **options: Any
) -> Iterator[dict[str, Any]]:
    """Decodes latents; yields `line` and `decoded`, and `text` and `condition` if the
    latents have them.

    Args:
        model_dir: where `vae` is from.
        latents: a directory of `dsvae encode`, or a safetensors file with `z` or `mean`,
            (N, Z) or (N, K, d), and maybe `valid` (N, K).
        normalized: z is (raw z - `normalizer_mean`) / `normalizer_std`, two more tensors of
            the file.

    Raises:
        UserError: the latents are damaged, those of another model, or not normalized.
    """
    path = Path(latents).expanduser()
    if path.is_dir():
        found = Latents(path)
        if found.manifest["identity"]["model"] != model_digest(pretrained.find_model(model_dir)):
            raise UserError(
                f"{path} has latents of another model ({found.manifest['model']}), and its "
                f"numbers mean nothing to {model_dir}: give that model, or encode again"
            )
        shards = found.shards()
    else:
        shards = iter([read_latents_file(path)])
    for tensors, strings in shards:
        z, valid = tensors.get("z", tensors.get("mean")), tensors.get("valid")
        if z is None:
            raise UserError(f"{path} has neither z nor mean: name the tensor z")
        z = z.float().flatten(1)
        if z.shape[1] != vae.latent_dim:
            raise UserError(
                f"{path} has {z.shape[1]} numbers per text, and z of {model_dir} has "
                f"{vae.latent_dim}: give the model that they are for"
            )
        if normalized:
            if not {"normalizer_mean", "normalizer_std"} <= tensors.keys():
                raise UserError(
                    f"{path} has no normalizer_mean and normalizer_std: put those of a "
                    f"manifest.json into it, or leave --normalized out"
                )
            z = z * tensors["normalizer_std"].flatten() + tensors["normalizer_mean"].flatten()
        lines = tensors.get("line", torch.arange(1, len(z) + 1)).tolist()
        window = WINDOW * vae.batch_size
        for start in range(0, len(z), window):
            part = slice(start, start + window)
            conditions = strings["condition"][part] if "condition" in strings else None
            own = None if valid is None else valid[part].bool()
            texts = vae.decode(z[part], conditions, valid=own, **options)
            for row, text in enumerate(texts, start):
                known = {name: each[row] for name, each in strings.items()}
                yield {"line": lines[row], **known, "decoded": text}


def read_latents_file(path: Path) -> tuple[Tensors, Strings]:
    """Returns the tensors of a safetensors file of z, and no texts. Raises UserError if
    there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file or directory; give latents of dsvae encode")
    try:
        return load_file(path), {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file ({first_line(error)})") from error
