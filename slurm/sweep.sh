#!/usr/bin/env bash
# Submits every run of a list as one array job, DSVAE_AT_ONCE at a time, and behind it a job that compares them:
#
#   DSVAE_GPUS_PER_NODE=1 DSVAE_AT_ONCE=6 slurm/sweep.sh [--dry_run] slurm/sweeps/park2021.txt --config park2021 --train_file train.txt ...
#
# The arguments behind the list hold for all runs. Code and list are those of now. A member that is cut is requeued and goes on; the same
# command again starts what is not finished. Prints the ids of the array and of the comparison.
set -u
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=slurm/site.sh
. "$code/slurm/site.sh"
# shellcheck source=slurm/lib.sh
. "$code/slurm/lib.sh"
# shellcheck source=slurm/members.sh
. "$code/slurm/members.sh"

dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
[ $# -ge 1 ] || die 2 "usage: slurm/sweep.sh [--dry_run] LIST TRAIN_ARGS..."
list=$1
shift
members "$code" "$list" "$@" || exit 2
from=$code frozen_list=$list
ARGS=("$@")
if [ -z "$dry_run" ]; then
    name=$(basename "$list")
    frozen=runs/${name%.*}/slurm/submitted-$(date +%Y%m%d-%H%M%S)-$$
    snapshot "$code" "$frozen" || die 2 "cannot write to $frozen"
    cp "$list" "$frozen/$name" || exit 2
    freeze_args "$code" "$frozen" "$@"
    from=$(cd "$frozen/code" && pwd -P) frozen_list=$(cd "$frozen" && pwd -P)/$name
fi
sbatch_options ""
array=(sbatch --parsable --array="1-${#RUN_DIRS[@]}%$DSVAE_AT_ONCE" "${OPTIONS[@]}" "$from/slurm/sweep.sbatch" "$frozen_list" "${ARGS[@]}")
# The same script without an array index: one small task, after all members have ended, well or not.
compare=(sbatch --parsable --job-name=dsvae-compare --output=%x-%j.out)
for option in "${OPTIONS[@]}"; do
    case $option in --partition=* | --account=* | --qos=*) compare+=("$option") ;; esac
done
if [ -n "$dry_run" ]; then
    shown "${array[@]}"
    shown "${compare[@]}" --dependency=afterany:ID_OF_THE_ARRAY "$from/slurm/sweep.sbatch" "$frozen_list" "${ARGS[@]}"
    printf '# %s\n' "${RUN_DIRS[@]}"
else
    id=$(DSVAE_ROOT='' "${array[@]}") || die 2 "the sweep was not submitted"
    id=${id%%;*}
    echo "$id"
    DSVAE_ROOT='' "${compare[@]}" --dependency="afterany:$id" "$from/slurm/sweep.sbatch" "$frozen_list" "${ARGS[@]}"
fi
