#!/usr/bin/env bash
# Submits a training job with the resources that slurm/site.sh (or the environment) names:
#
#   DSVAE_NODES=2 DSVAE_GPUS_PER_NODE=4 DSVAE_TIME=1-0 slurm/submit.sh [--dry_run] \
#       --config park2021 --model google-t5/t5-large ...
#
# The job runs a snapshot of the code as it is now. Prints the job's id.
set -u
# shellcheck source=slurm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

freeze_run "$@"
sbatch_options ""
submit '' "${OPTIONS[@]}" "$FROM/slurm/train.sbatch" "${ARGS[@]}"
