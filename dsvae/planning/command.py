"""The work of `dsvae plan`: its arguments, and what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsvae.config import ALIASES, RECIPES
from dsvae.errors import UserError, nearest
from dsvae.planning.plan import Machine, Option, Plan, make_plan
from dsvae.planning.show import advise, as_json, as_text
from dsvae.planning.sizes import KNOWN, known_name

RECIPE = "park2021"
"""That of the run for a model given by name: it does not set a model itself."""
MOST_BYTES = 10**18
"""More is a typing error, and the largest would be infinite."""


def plan_command(
    model: str,
    *,
    config: str | None,
    gpus: int,
    gpu_memory: str,
    gpus_per_node: int,
    host_memory: str,
    margin: float,
    gradient_checkpointing: bool | None,
    ds_config: str | None,
    fields: Mapping[str, Any],
) -> tuple[str, str]:
    """Returns a plan as (text, one line of JSON). The arguments are the flags of
    `dsvae plan`.

    Args:
        fields: of the run, by their dotted or short names.

    Raises:
        UserError: an unknown model, an invalid size, or a configuration that a run
            would refuse.
    """
    flags = {ALIASES.get(name, name): value for name, value in fields.items()}
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UserError(
            f"--gpus {gpus} is not a multiple of --gpus_per_node {gpus_per_node}: every node runs "
            f"as many ranks"
        )
    memory = bytes_of(gpu_memory, "--gpu_memory"), bytes_of(host_memory, "--host_memory")
    machine = Machine(gpus, memory[0], gpus_per_node, memory[1], margin / 100)

    def change(machine: Machine, other_flags: dict[str, Any], option: Option) -> Plan:
        arguments = _run_arguments(model, config, flags | other_flags)
        file, checkpointing = option.ds_config, option.gradient_checkpointing
        return make_plan(arguments, machine, file, checkpointing)

    arguments = _run_arguments(model, config, flags)
    plan = make_plan(arguments, machine, ds_config, gradient_checkpointing)
    advice = advise(plan, change) if plan.chosen is None else None
    return as_text(plan, advice), json.dumps(as_json(plan, advice))


def bytes_of(text: str, flag: str) -> int:
    """Reads `40GB` (10^9), `80GiB` (2^30), `512MB`, or plain bytes."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    example = "give bytes with a unit, for example 40GB or 80GiB"
    if match is None:
        raise UserError(f"{flag} is {text!r}: {example}")
    number, prefix, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " ")
    if not 1 <= size <= MOST_BYTES:  # without the text, which can be long
        limit = "less than one byte" if size < 1 else f"more than {MOST_BYTES // 10**12:,} TB"
        raise UserError(f"{flag} is {limit}: {example}")
    return int(size)


def _run_arguments(model: str, config: str | None, flags: dict[str, Any]) -> list[str]:
    """Returns the arguments of dsvae/train.py for a model or for a configuration that
    names one."""
    known = model if (Path(model) / "config.json").is_file() else known_name(model)
    if known is not None:
        words = ["--config", config or RECIPE, "--model", known]
    elif Path(model).suffix in (".yaml", ".yml") or (RECIPES / f"{model}.yaml").is_file():
        if config is not None:
            raise UserError(f"{model} and --config {config} are two configurations: give one")
        words = ["--config", model]
    else:
        full_names = {name.split("/")[-1]: name for name in KNOWN}
        close = nearest(model.split("/")[-1], full_names)
        raise UserError(
            f"{model!r} is not a public T5 that is known offline, nor a directory with a "
            f"config.json, a recipe or a YAML file"
            + (f"; did you mean {full_names[close]}?" if close else "")
        )
    for name, value in flags.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words
