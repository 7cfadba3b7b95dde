"""A plan as text and as JSON, and what to change if nothing fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dsvae.planning.plan import GPU_BASE, HOST_BASE, Machine, Option, Plan

GB = 10**9
MOST_GPUS = 64


def advise(plan: Plan, change: Callable[[Machine, dict[str, Any], Option], Plan]) -> dict[str, Any]:
    """Returns the smallest need, in bytes with the margin, and flags that suffice
    alone.

    It halves the tokens, then doubles the GPUs, with the option that needs the smallest
    share of a GPU. `change` plans one option for another machine and with other flags
    of the run.
    """
    machine = plan.machine
    keep = 1 - machine.margin
    changes = []
    on_host = [o for o in plan.options if o.host <= keep * machine.host_memory]
    least = min(on_host or plan.options, key=lambda option: option.gpu)
    tokens = plan.config.data.micro_batch_tokens
    while (tokens := tokens // 2) >= plan.config.data.max_tokens:
        evaluation = min(tokens, plan.config.eval.batch_tokens)
        fewer = {"data.micro_batch_tokens": tokens, "eval.batch_tokens": evaluation}
        if change(machine, fewer, least).chosen is not None:
            changes.append(f"--batch_tokens {tokens} --eval_batch_tokens {evaluation}")
            break
    gpus = machine.gpus
    while (gpus := gpus * 2) <= min(MOST_GPUS, plan.config.data.batch_size):
        if change(dataclasses.replace(machine, gpus=gpus), {}, least).chosen is not None:
            changes.append(f"--gpus {gpus}")
            break
    # With more of one memory alone, rounded up as it is printed.
    if on_host:
        changes.append(f"--gpu_memory {_up(least.gpu / keep)}GB")
    if on_gpu := [o.host for o in plan.options if o.gpu <= keep * machine.gpu_memory]:
        changes.append(f"--host_memory {_up(min(on_gpu) / keep)}GB")
    return {
        "gpu_memory": int(min(o.gpu for o in plan.options) / keep),
        "host_memory": int(min(o.host for o in plan.options) / keep),
        "changes": changes,
    }


def _up(size: float) -> float:
    return math.ceil(size / GB * 10) / 10


def as_json(plan: Plan, advice: dict[str, Any] | None) -> dict[str, Any]:
    """Returns everything, sizes in bytes. `fits` is the index of the chosen option, or
    null."""
    rows, tokens, count = plan.rows, plan.tokens, plan.micro_batches
    return {
        "parameters": plan.parameters,
        "trained": plan.trained,
        "micro_batch": {"sentences": rows, "tokens": tokens, "of_a_step": count},
        "gpus": plan.machine.gpus,
        "nodes": plan.machine.nodes,
        "margin": plan.machine.margin,
        "options": [_option(plan, option) for option in plan.options],
        "fits": None if plan.chosen is None else plan.options.index(plan.chosen),
        "command": None if plan.chosen is None else plan.command(plan.chosen),
        "instead": advice,
        "estimate": True,
    }


def as_text(plan: Plan, advice: dict[str, Any] | None) -> str:
    """Returns what is needed, one line per option; which one to take, and its
    command."""
    machine = plan.machine
    lines = [
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; micro-batches of {plan.rows} "
        f"sentences of {plan.tokens} tokens, {plan.micro_batches} per step on each of "
        f"{machine.gpus} GPUs",
        "",
        f"{'ds_config':<34} {'checkpointing':<13} {'GB/GPU':>9} {'GB/node':>9} {'GB disk':>8}",
    ]
    for option in plan.options:
        fits = "fits" if option.fits(machine) else "too large"
        mark = "<- the first that fits" if option is plan.chosen else fits
        checkpointing = "yes" if option.gradient_checkpointing else "no"
        lines.append(
            f"{option.ds_config:<34} {checkpointing:<13} {option.gpu / GB:>9.1f} "
            f"{option.host / GB:>9.1f} {option.estimate.disk / GB:>8.1f}  {mark}"
        )
    lines.append("")
    if plan.chosen is not None:
        lines += [_sizes(plan, plan.chosen), "", plan.command(plan.chosen)]
    elif advice is not None:
        remedy = f"Neither smaller micro-batches nor up to {MOST_GPUS} GPUs would suffice."
        if advice["changes"]:
            remedy = f"It would fit with {', or with '.join(advice['changes'])}."
        lines.append(
            "Nothing fits. The smallest need of any option is "
            f"{advice['gpu_memory'] / GB:.1f} GB per GPU and {advice['host_memory'] / GB:.1f} GB "
            f"per node, margin included. {remedy}"
        )
    lines += [
        "",
        "This is an estimate of the peaks of tensors, checked on CPU (docs/plan.md), not on "
        f"GPUs. It adds {GPU_BASE / GB:.1f} GB per GPU and {HOST_BASE / GB:.0f} GB of host memory "
        f"per process for CUDA and the libraries, and leaves {machine.margin:.0%} free.",
    ]
    return "\n".join(lines)


def _sizes(plan: Plan, option: Option) -> str:
    """Returns what a GPU holds, and its peaks, the largest first."""
    estimate = option.estimate
    peaks = dict(sorted(estimate.moments.items(), key=lambda item: -item[1]))
    held, peak = (
        ", ".join(f"{name} {size / GB:.2f}" for name, size in sizes.items())
        for sizes in (estimate.gpu, peaks)
    )
    left = plan.machine.gpu_memory - option.gpu
    return f"A GPU holds {held} GB; peaks: {peak} GB. {left / GB:.1f} GB are left."


def _option(plan: Plan, option: Option) -> dict[str, Any]:
    return {
        "ds_config": option.ds_config,
        "gradient_checkpointing": option.gradient_checkpointing,
        "fits": option.fits(plan.machine),
        "gpu_bytes": option.gpu,
        "host_bytes": option.host,
        "disk_bytes": option.estimate.disk,
        "gpu": option.estimate.gpu,
        "gpu_moments": option.estimate.moments,
        "host": option.estimate.host,
        "host_moments": option.estimate.host_moments,
        "command": plan.command(option),
    }
