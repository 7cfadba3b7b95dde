"""Latents in one safetensors file: the posteriors of sentences, or a fitted prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsvae.errors import UserError
from dsvae.files import make_writable, whole_path
from dsvae.generation.reading import Line
from dsvae.modeling.families import Distribution


def check_place(path: str) -> None:
    """Makes sure, before hours of work, that a file can be written.

    Raises:
        UserError: it cannot.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        raise UserError(f"cannot write {place}: it is a directory; name a file in it")
    make_writable(place.parent, "--output")


def write_latents(
    path: str, batches: Sequence[tuple[Sequence[Line], Distribution, Distribution | None]]
) -> None:
    """Writes posteriors to a file, which appears whole or not at all.

    Its tensors have a row per sentence: `line` (N,) int64, the number of the sentence in
    its source; the parameters of the posterior by their names, float32, for the Gaussian
    `mean` and `logvar` (N, Z); `scale` (N, Z), the standard deviations of z. Those of a
    learned prior begin with `prior_`. `normalizer_mean` and `normalizer_std` (Z,) are those
    of z over all sentences: (z - normalizer_mean) / normalizer_std has mean 0 and variance 1.
    Of K vectors per text, all of these are (N, K, d) and (K, d), and `valid` (N, K) says
    which there are.

    Args:
        batches: at least one: sentences, their posteriors, and their priors if these
            are learned.

    Raises:
        UserError: the place cannot be written, or is full.
    """
    parts = [_rows(posterior, prior) for _, posterior, prior in batches]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors["line"] = torch.tensor([line.line for lines, _, _ in batches for line in lines])
    mean = torch.cat([posterior.moments()[0] for _, posterior, _ in batches]).double()
    square = tensors["scale"].double().square()
    mean = mean.view_as(square)
    valid = tensors.get("valid")
    if valid is None:
        # Var[z] = E Var[z|x] + Var E[z|x]
        middle, variance = mean.mean(0), square.mean(0) + mean.var(0, correction=0)
    else:  # of each vector over the texts that have it
        count = valid.double().sum(0).clamp(min=1)[:, None]
        middle = mean.sum(0) / count
        variance = (square + mean.square()).sum(0) / count - middle.square()
    tensors["normalizer_mean"] = middle.float()
    tensors["normalizer_std"] = variance.clamp(min=0).sqrt().float()
    write_tensors(Path(path).expanduser(), tensors)


def _rows(posterior: Distribution, prior: Distribution | None) -> dict[str, Tensor]:
    """Returns what a batch has in the file."""
    found: dict[str, Tensor] = {}
    for prefix, each in (("", posterior), ("prior_", prior)):
        if each is not None:
            named = each.tensors()
            scale = each.moments()[1].sqrt()
            if "valid" in named:
                scale = scale.unflatten(1, (named["valid"].shape[1], -1))
            named = {**named, "scale": scale}
            found |= {f"{prefix}{name}": tensor for name, tensor in named.items()}
    return found


def write_tensors(
    place: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, which appears whole or not at all. Raises UserError if
    it cannot."""
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    known = {"format": "pt", "dsvae": version("dsvae"), **(metadata or {})}
    try:
        with whole_path(place) as temporary:
            save_file(rows, temporary, metadata=known)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {place}: {reason}; choose a place that can be written"
        ) from error
