"""What generation can be asked for: names that the command line shares, and the options of
transformers' `generate` that it takes, with their types and combinations without
effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dsvae.errors import UserError, first_line

PathKind = Literal["linear", "slerp"]
"""The ways from one z to another: `dsvae.generation.geometry`."""
PriorKind = Literal["gaussian", "gmm", "flow"]
"""The densities that are fitted: `dsvae.generation.fitted_prior`."""
SolverKind = Literal["euler", "heun"]
"""How the field of a prior by flow matching is followed: `dsvae.generation.flow_prior`."""
SourceKind = Literal["prior", "aggregate", "fitted", "flow"]
"""Where z comes from."""
LatentFormat = Literal["safetensors", "parquet"]
LatentType = Literal["float32", "bf16", "fp16"]
"""The files of `dsvae encode`, and the numbers in them."""
Scale = Literal["prior", "posterior"]
"""What a traversal counts standard deviations of."""

SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "top_h": float,
    "typical_p": float,
    "epsilon_cutoff": float,
    "eta_cutoff": float,
}
"""Read only if `do_sample` is on."""

BEAMS: dict[str, type] = {"early_stopping": bool, "length_penalty": float}
"""Read only if `num_beams` is at least 2."""

OPTIONS: dict[str, type] = {
    "do_sample": bool,
    "num_beams": int,
    "max_new_tokens": int,
    "min_new_tokens": int,
    **SAMPLING,
    **BEAMS,
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "renormalize_logits": bool,
    "remove_invalid_values": bool,
    "bad_words_ids": list,
    "suppress_tokens": list,
    "begin_suppress_tokens": list,
    "use_cache": bool,
}
"""Name -> type. Options that would change the form of the output
(num_return_sequences, output_scores, ...) are left out."""


def check(options: Mapping[str, Any]) -> None:
    """Raises UserError for options that transformers would refuse, or ignore with only
    a warning."""
    # Imported here: help and usage errors of the command line need only the names.
    from transformers import GenerationConfig

    for name in options:
        if name in SAMPLING and not options.get("do_sample"):
            raise UserError(
                f"--{name} has no effect without --do_sample: add it, or leave --{name} out"
            )
        if name in BEAMS and options.get("num_beams", 1) < 2:
            raise UserError(
                f"--{name} has no effect without beams: add --num_beams 4, or leave --{name} out"
            )
    if options.get("num_beams", 1) < 1:
        raise UserError(f"--num_beams is {options['num_beams']}: give at least 1")
    try:
        GenerationConfig(**options)
    except (ValueError, TypeError) as error:
        raise refusal(options, error) from error


def refusal(options: Mapping[str, Any], error: Exception) -> UserError:
    """Makes the error for options that transformers refused."""
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    return UserError(
        f"transformers' generate refuses {given or 'its options'}: "
        f"{first_line(error).rstrip('.')}; change the option"
    )
