#!/usr/bin/env bash
# Submits every run of a list as one array job, DSVAE_AT_ONCE at a time, and after it a job that
# compares them:
#
#   DSVAE_GPUS_PER_NODE=1 DSVAE_AT_ONCE=6 slurm/sweep.sh [--dry_run] slurm/sweeps/park2021.txt \
#       --config park2021 --train_file train.txt ...
#
# The arguments after the list hold for all runs. The jobs run the code and the list as they are
# now. A member that is cut is requeued and continues; the same command again starts what is not
# finished. Prints the ids of the array and of the comparison.
set -u
# shellcheck source=slurm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -ge 1 ] || die 2 "usage: slurm/sweep.sh [--dry_run] LIST TRAIN_ARGS..."
list=$1
shift
ask members "$list" "$@"
runs=("${ANSWER[@]}")
name=$(basename "$list")
freeze "runs/${name%.*}"
if [ -z "$dry_run" ]; then
    cp "$list" "$FROZEN/$name" || exit 2
    list=$(cd "$FROZEN" && pwd -P)/$name
fi
ask arguments "$FROZEN" '' "$@"
member=("$FROM/slurm/sweep.sbatch" "$list" "${ANSWER[@]}")
sbatch_options ""
submit ID_OF_THE_ARRAY --array="1-${#runs[@]}%$DSVAE_AT_ONCE" "${OPTIONS[@]}" "${member[@]}" ||
    die 2 "the sweep was not submitted"
# The same script without an array index: one small task, after all members have ended, well or
# not.
compare=(--job-name=dsvae-compare --output=%x-%j.out)
for option in "${OPTIONS[@]}"; do
    case $option in --partition=* | --account=* | --qos=*) compare+=("$option") ;; esac
done
submit '' "${compare[@]}" --dependency="afterany:$ID" "${member[@]}" || exit
if [ -n "$dry_run" ]; then printf '# %s\n' "${runs[@]}"; fi
