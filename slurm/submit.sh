#!/usr/bin/env bash
# Submits a training job with the resources that slurm/site.sh (or the environment) names:
#
#   DSVAE_NODES=2 DSVAE_GPUS_PER_NODE=4 DSVAE_TIME=1-0 slurm/submit.sh [--dry_run] --config park2021 --model google-t5/t5-large ...
#
# The job runs a snapshot of the code as it is now. Prints the job's id.
set -u
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=slurm/site.sh
. "$code/slurm/site.sh"
# shellcheck source=slurm/lib.sh
. "$code/slurm/lib.sh"

dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
run=$(run_dir "$code" "$@")
sbatch_options ""
from=$code
ARGS=("$@")
if [ -z "$dry_run" ]; then
    frozen=$run/slurm/submitted-$(date +%Y%m%d-%H%M%S)-$$
    snapshot "$code" "$frozen" || die 2 "cannot write to $frozen"
    freeze_args "$code" "$frozen" "$@"
    from=$(cd "$frozen/code" && pwd -P)
fi
complete_args "$from" "$run" "${ARGS[@]}"
submit=(sbatch --parsable "${OPTIONS[@]}" "$from/slurm/train.sbatch" "${ARGS[@]}")
if [ -n "$dry_run" ]; then
    shown "${submit[@]}"
else
    DSVAE_ROOT='' "${submit[@]}"
fi
