#!/usr/bin/env bash
# A training run inside its allocation: job.sh [--dry_run] TRAIN_ARGS... train.sbatch and
# sweep.sbatch become this script.
#
# Start: snapshot of code and configuration, preflight, one srun task per rank. End, by the exit
# code of the ranks (dsvae/errors.py):
#   0            the same command finds the run finished and leaves at once
#   75           stopped by a signal: requeued, and the next start continues from what was saved
#   130          stopped by SIGINT, which only a person sends: the job ends with that code
#   69, signals  a rank was lost: requeued, at most DSVAE_MAX_FAILURES times
#   others       the job ends with that code
set -u
# shellcheck source=slurm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

restarts=${SLURM_RESTART_COUNT:-0}
forget_another_array
# For scontrol, the number of an array's last member is that of the whole array: a member is named
# by its index.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# A link to `dir`, where train.sbatch and the lines below look at a restart.
pointer=$SLURM_SUBMIT_DIR/.slurm-jobs/$SLURM_JOB_ID

# ---- What runs, and a record of it beside the run.
activate
if [ "$restarts" -gt 0 ] && [ -f "$pointer/arguments" ]; then
    # As it began, whatever happened to the files it was made of.
    dir=$(readlink "$pointer")
    run=${dir%/slurm/*}
    mapfile -d '' -t ARGS < "$dir/arguments"
else
    ask output_dir "$@"
    run=${ANSWER[0]} copies=''
    dir=$run/slurm/$job
    if [ -z "$dry_run" ]; then
        mkdir -p "$dir" || die 78 "$(hostname) cannot write to $run"
        dir=$(cd "$dir" && pwd -P)
        if [ ! -e "$code/SNAPSHOT" ]; then
            snapshot "$dir" || die 78 "$(hostname) cannot write a snapshot to $dir"
            code=$dir/code
        fi
        copies=$dir
    fi
    ask arguments "$copies" "$code/ds_configs/zero2.json" "$@"
    ARGS=("${ANSWER[@]}")
    if [ -z "$dry_run" ]; then
        printf '%s\0' "${ARGS[@]}" > "$dir/arguments"
        if mkdir -p "${pointer%/*}" 2>/dev/null; then ln -sfn "$dir" "$pointer"; fi
    fi
fi
command=$(shown "${ARGS[@]}")

# ---- --signal=B:USR1@N reaches this shell; srun passes USR1 on to every rank. Preemption's SIGTERM
# reaches the ranks directly.
srun_pid='' interrupted='' warned=''
# shellcheck disable=SC2317  # called by trap
forward() {
    interrupted=1 warned=1
    say "signal: the ranks save and leave"
    if [ -n "$srun_pid" ]; then kill -USR1 "$srun_pid" 2>/dev/null; fi
}
trap forward USR1 TERM

leave() { # CODE: the end of this job, for good
    rm -f "$pointer" 2>/dev/null
    exit "$1"
}
requeue() { # WHY CODE: back into the queue, or the end
    local again="The same sbatch command continues from here."
    if [ "$restarts" -ge "$DSVAE_MAX_RESTARTS" ]; then
        say "$1; restarted $restarts times already: given up. $again"
        leave "$2"
    fi
    # SLURM itself is ending a job that is no longer RUNNING: cancelled, or requeued by SLURM (which
    # then needs the pointer).
    if ! scontrol show job "$job" | grep -q 'JobState=RUNNING'; then
        say "$1; SLURM is ending the job. $again"
        exit "$2"
    fi
    say "$1: requeued"
    # Requeueing ends this script, and would end scontrol before it can say that it has succeeded.
    trap '' TERM USR1
    if ! scontrol requeue "$job"; then
        say "SLURM does not requeue this job. $again"
        leave "$2"
    fi
    exit "$2"
}

ask state "${ARGS[@]}"
if [ "${ANSWER[0]}" = finished ]; then
    say "finished already ($run/status.json): nothing to do"
    leave 0
fi
if [ "$restarts" -gt "$DSVAE_MAX_RESTARTS" ]; then # by SLURM itself, after lost nodes
    say "restarted $restarts times: given up"
    leave 69
fi

layout
export DSVAE_CONTAINER DSVAE_PYTHON PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
step=("${SRUN[@]}" --wait="$DSVAE_WAIT" --open-mode=append --output="${dir//%/%%}/rank-%t.log"
    bash "$code/slurm/rank.sh" "$code/dsvae/train.py" "${ARGS[@]}")
say "job $job, start $((restarts + 1)): ${NODES[*]}, $RANKS rank(s), $PER_NODE per node;" \
    "code $code; logs $dir; the run: ${ANSWER[0]}"
say "train.py $command"
if [ -n "$dry_run" ]; then
    shown "${step[@]}"
    leave 0
fi

# ---- Preflight.
if [ "$DSVAE_PREFLIGHT" != 0 ]; then
    DSVAE_ACTIVATED=1 bash "$code/slurm/preflight.sh" "$run"
    status=$?
    if [ -z "$warned" ] && [ "$status" -ne 0 ]; then leave "$status"; fi
fi
if [ -n "$warned" ]; then requeue "a signal came before training began" 75; fi

# ---- The ranks.
: >> "$dir/rank-0.log"
from=$(($(wc -c < "$dir/rank-0.log") + 1))
"${step[@]}" &
srun_pid=$!
# Rank 0 in the job's own log.
tail -c "+$from" -F --pid="$srun_pid" "$dir/rank-0.log" 2>/dev/null &
tail_pid=$!
while :; do
    interrupted=''
    wait "$srun_pid"
    status=$?
    [ -n "$interrupted" ] || break # else it was the signal that ended `wait`
done
wait "$tail_pid"

# ---- What the exit code asks for.
if [ "$status" -eq 0 ]; then
    say "finished"
    leave 0
fi
say "exit code $status; logs of all ranks: $dir/rank-*.log"
if [ "$status" -eq 130 ]; then
    say "interrupted. The same sbatch command continues from here."
    leave "$status"
elif [ "$status" -eq 75 ] || { [ -n "$warned" ] && [ "$status" -ge 128 ]; }; then
    # 128 and more: so early that there was nothing to save
    requeue "stopped by a signal" 75
elif [ "$status" -eq 69 ] || [ "$status" -ge 128 ]; then
    date +%FT%T >> "$dir/failures"
    failures=$(wc -l < "$dir/failures")
    if [ "$failures" -gt "$DSVAE_MAX_FAILURES" ]; then
        say "a rank was lost for the ${failures}th time: given up." \
            "The same sbatch command continues from the last complete checkpoint."
        leave "$status"
    fi
    requeue "a rank was lost ($failures of at most $DSVAE_MAX_FAILURES times)" "$status"
fi
leave "$status"
