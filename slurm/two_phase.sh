#!/usr/bin/env bash
# Phase 1 and phase 2 as two jobs, each with its own resources; phase 2 starts when phase 1 has finished, and never if it has failed:
#
#   DSVAE_PHASE1_GPUS_PER_NODE=1 DSVAE_PHASE2_GPUS_PER_NODE=4 slurm/two_phase.sh [--dry_run] --config park2021 --output_dir runs/large ...
#
# DSVAE_PHASE1_X and DSVAE_PHASE2_X override DSVAE_X of slurm/site.sh. With a frozen decoder (--phase1.freeze_decoder true, as in
# park2021) phase 1 has no gradients and no optimizer state for half of the model and fits smaller GPUs. Both phases get all
# arguments: the configuration belongs to the whole run. Prints both ids.
set -u
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=slurm/site.sh
. "$code/slurm/site.sh"
# shellcheck source=slurm/lib.sh
. "$code/slurm/lib.sh"

dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
if flag phase "$@" > /dev/null; then die 2 "--phase is given by two_phase.sh"; fi
run=$(run_dir "$code" "$@")
from=$code
ARGS=("$@")
if [ -z "$dry_run" ]; then
    frozen=$run/slurm/submitted-$(date +%Y%m%d-%H%M%S)-$$
    snapshot "$code" "$frozen" || die 2 "cannot write to $frozen"
    freeze_args "$code" "$frozen" "$@"
    from=$(cd "$frozen/code" && pwd -P)
fi
complete_args "$from" "$run" "${ARGS[@]}"

after=()
for phase in 1 2; do
    sbatch_options "PHASE$phase"
    submit=(sbatch --parsable "${after[@]}" --job-name="dsvae-phase$phase" "${OPTIONS[@]}" "$from/slurm/train.sbatch"
        "${ARGS[@]}" --phase "$phase")
    if [ -n "$dry_run" ]; then
        shown "${submit[@]}"
        id=ID_OF_PHASE_1
    else
        id=$(DSVAE_ROOT='' "${submit[@]}") || die 2 "phase $phase was not submitted"
        id=${id%%;*}
        echo "$id"
    fi
    after=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
done
