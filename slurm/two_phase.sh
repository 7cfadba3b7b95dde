#!/usr/bin/env bash
# Phase 1 and phase 2 as two jobs, each with its own resources. Phase 2 starts when phase 1 has
# finished, and never if it has failed:
#
#   DSVAE_PHASE1_GPUS_PER_NODE=1 DSVAE_PHASE2_GPUS_PER_NODE=4 slurm/two_phase.sh [--dry_run] \
#       --config park2021 --output_dir runs/large ...
#
# DSVAE_PHASE1_X and DSVAE_PHASE2_X override DSVAE_X of slurm/site.sh. With a frozen decoder
# (--phase1.freeze_decoder true, as in park2021) phase 1 has no gradients and no optimizer state
# for half of the model and fits smaller GPUs. Both phases get all arguments: the configuration
# belongs to the whole run. Prints both ids.
set -u
# shellcheck source=slurm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

for word in "$@"; do
    case $word in
        --phase | --phase=*) die 2 "two_phase.sh gives --phase itself: leave it out" ;;
    esac
done
freeze_run "$@"

after=()
for phase in 1 2; do
    sbatch_options "PHASE$phase"
    submit ID_OF_PHASE_1 "${after[@]}" --job-name="dsvae-phase$phase" "${OPTIONS[@]}" \
        "$FROM/slurm/train.sbatch" "${ARGS[@]}" --phase "$phase" ||
        die 2 "phase $phase was not submitted"
    after=(--dependency="afterok:$ID" --kill-on-invalid-dep=yes)
done
