"""The job behind `dsvae plan`."""

from __future__ import annotations

import json
from typing import Any

from dsvae.errors import UserError
from dsvae.planning.advice import advise
from dsvae.planning.plan import SHIPPED, Machine, Option, Plan, bytes_of, make_plan, run_arguments
from dsvae.planning.show import as_json, as_text


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
    flags: dict[str, Any],
) -> tuple[str, str]:
    """(text, one line of JSON) of a plan.

    Args:
        margin: per cent of every memory that is to stay free.
        flags: fields of the run's configuration and their values; None: as the recipe
            has it.

    Raises:
        UserError: an unknown model, a size that is none, a configuration that a run
            would refuse.
    """
    if gpus < 1 or gpus_per_node < 1:
        raise UserError("--gpus and --gpus_per_node must be at least 1")
    if not 0 <= margin < 100:
        raise UserError(f"--margin is {margin}: per cent, at least 0 and less than 100")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise UserError(
            f"--gpus {gpus} is no multiple of --gpus_per_node {gpus_per_node}: every node runs "
            f"as many ranks"
        )
    machine = Machine(
        gpus,
        bytes_of(gpu_memory, "--gpu_memory"),
        gpus_per_node,
        bytes_of(host_memory, "--host_memory"),
        margin / 100,
    )

    def again(machine: Machine, tokens: int | None, option: Option) -> Plan:
        fewer = (
            {}
            if tokens is None
            else {"data.micro_batch_tokens": tokens, "eval.batch_tokens": tokens}
        )
        if tokens is not None and plan.config.eval.batch_tokens < tokens:
            del fewer["eval.batch_tokens"]
        return make_plan(
            run_arguments(model, config, {**flags, **fewer}),
            machine,
            ds_config_file=option.ds_config
            if ds_config
            else str(SHIPPED.parent / option.ds_config),
            checkpointing=option.gradient_checkpointing,
        )

    plan = make_plan(
        run_arguments(model, config, flags),
        machine,
        ds_config_file=ds_config,
        checkpointing=gradient_checkpointing,
    )
    advice = None if plan.chosen is not None else advise(plan, again)
    return as_text(plan, advice), json.dumps(as_json(plan, advice))
