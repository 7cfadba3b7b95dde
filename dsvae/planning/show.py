"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsvae.planning.advice import Advice
from dsvae.planning.plan import GPU_BASE, HOST_BASE, Option, Plan

GB = 10**9


def as_json(plan: Plan, advice: Advice | None) -> dict[str, Any]:
    """Everything, sizes in bytes. `fits` is the chosen option's place in `options`,
    null where none fits."""
    return {
        "parameters": plan.parameters,
        "trained": plan.trained,
        "micro_batch": {
            "sentences": plan.rows,
            "tokens": plan.tokens,
            "of_a_step": plan.micro_batches,
        },
        "gpus": plan.machine.gpus,
        "nodes": plan.machine.nodes,
        "margin": plan.machine.margin,
        "options": [_option(plan, option) for option in plan.options],
        "fits": None if plan.chosen is None else plan.options.index(plan.chosen),
        "command": None if plan.chosen is None else plan.command(plan.chosen),
        "instead": None if advice is None else dataclasses.asdict(advice),
        "estimate": True,
    }


def as_text(plan: Plan, advice: Advice | None) -> str:
    """What is needed, one line per option; which one to take, and its command."""
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
        lines += _chosen(plan, plan.chosen)
    elif advice is not None:
        lines.append("Nothing fits. " + advice.text)
    lines += [
        "",
        "This is an estimate of the peaks of tensors, checked on CPU (docs/plan.md), not on "
        f"GPUs. It adds {GPU_BASE / GB:.1f} GB per GPU and {HOST_BASE / GB:.0f} GB of host memory "
        f"per process for CUDA and the libraries, and leaves {machine.margin:.0%} free.",
    ]
    return "\n".join(lines)


def _chosen(plan: Plan, option: Option) -> list[str]:
    moments = sorted(option.estimate.moments.items(), key=lambda item: -item[1])
    left = plan.machine.gpu_memory - option.gpu
    return [
        "A GPU holds "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in option.estimate.gpu.items())
        + " GB; peaks: "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in moments)
        + f" GB. {left / GB:.1f} GB are left.",
        "",
        plan.command(option),
    ]


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
