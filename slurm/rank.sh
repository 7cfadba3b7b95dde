#!/usr/bin/env bash
# One rank, as srun starts it: rank.sh PYTHON_ARGS... It becomes python, so that signals to the step
# reach train.py and nothing else.
set -u
# shellcheck source=slurm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh" # checks this node's bash
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
# If each task sees one GPU only (--gpus-per-task, bound), that one is its number 0.
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && [[ $CUDA_VISIBLE_DEVICES != *,* ]]; then LOCAL_RANK=0; fi
echo "== rank $RANK of $WORLD_SIZE on ${SLURMD_NODENAME:-$(hostname)}, job $SLURM_JOB_ID," \
    "restart ${SLURM_RESTART_COUNT:-0}, $(date +%FT%T)"
read -r -a container <<< "$DSVAE_CONTAINER"
exec "${container[@]}" "$DSVAE_PYTHON" "$@"
