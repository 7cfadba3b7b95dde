#!/usr/bin/env bash
#SBATCH --job-name=dsvae-preflight
#SBATCH --nodes=1
#SBATCH --output=%x-%j.out
#SBATCH --time=10
# Looks at an allocation before the expensive part: preflight.sh OUTPUT_DIR, inside a job (job.sh
# does so at every start), or by itself:
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/preflight.sh runs/large
#
# dsvae/parallel/preflight.py says what every rank checks. The script names the bad nodes and leaves
# with 78 (EXIT_PREFLIGHT in dsvae/errors.py).
set -u
if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -lt 1 ]; then
    echo "usage: sbatch [OPTIONS] slurm/preflight.sh OUTPUT_DIR" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ ! -f "$root/slurm/job.sh" ]; then # sbatch runs a copy of this file in a spool directory
    where='s|^ *Command=\(.*\)/slurm/preflight\.sh.*|\1|p'
    root=${DSVAE_ROOT:-$(scontrol show job "$SLURM_JOB_ID" | sed -n "$where" | head -n 1)}
fi
if [ ! -f "$root/slurm/job.sh" ]; then
    echo "slurm: error: no dsvae in '$root': set DSVAE_ROOT to the checkout" >&2
    exit 2
fi
# shellcheck source=slurm/lib.sh
. "$root/slurm/lib.sh"
layout
export DSVAE_CONTAINER DSVAE_PYTHON PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
export MASTER_PORT=$((MASTER_PORT + 1))
# job.sh has made the environment already, and says so. VIRTUAL_ENV or CONDA_PREFIX would not tell:
# sbatch hands on those of the shell that calls it.
activated=${DSVAE_ACTIVATED:-}
activate

report=$(mktemp)
trap 'rm -f "$report"' EXIT
# shellcheck disable=SC2016  # expanded in the ranks
begin='trap "" TERM USR1
if [ ! -f "$1" ]; then
    echo "preflight: BAD $SLURMD_NODENAME: rank $SLURM_PROCID: does not see $1:" \
        "it must lie on a shared file system"
    exit 78
fi
exec bash "$@"'
# A warning (preemption, time limit) is for the training that comes next: the ranks of this step
# ignore it. They have time limits of their own from their first check on. The outer one is for a
# step that srun cannot even start, and leaves time for imports from a cold file system.
longest=$((DSVAE_PREFLIGHT_SECONDS + 300))
timeout --kill-after=15 "$longest" "${SRUN[@]}" --wait="$longest" \
    bash -c "$begin" _ "$code/slurm/rank.sh" -m dsvae.parallel.preflight \
    --output_dir "$1" --seconds "$DSVAE_PREFLIGHT_SECONDS" --min_free_gb "$DSVAE_MIN_FREE_GB" \
    --nodes "$(IFS=,; echo "${NODES[*]}")" 2>&1 | tee "$report"

mapfile -t bad < <(sed -n 's/^preflight: BAD \([^:]*\):.*/\1/p' "$report" | sort -u)
for rank in $(seq 0 $((RANKS - 1))); do # a node that is gone says nothing
    node=${NODES[rank / PER_NODE]}
    if ! grep -q "^preflight: rank $rank \|^preflight: BAD [^:]*: rank $rank:" "$report"; then
        echo "preflight: BAD $node: rank $rank did not answer"
        bad+=("$node")
    fi
done
if [ ${#bad[@]} -gt 0 ]; then
    names=$(printf '%s\n' "${bad[@]}" | sort -u | paste -sd, -)
    echo "preflight: failed; bad: $names." \
        "Leave them out with sbatch --exclude=$names, or repair them."
    exit 78
fi
echo "preflight: ok"
