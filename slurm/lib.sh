# shellcheck shell=bash
# Functions that the scripts share. Sets `code`, the checkout or snapshot that this file is in,
# and reads site.sh.

# The scripts need mapfile -d, and empty arrays under set -u. bash reads and runs line by line,
# so an older one comes this far.
if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
    echo "slurm: error: bash ${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]} on $(hostname) is too old:" \
        "4.4 or newer is needed, first in PATH" >&2
    exit 2
fi
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=slurm/site.sh
. "$code/slurm/site.sh"
activated='' # 1 once this shell has the environment

say() { echo "slurm: $*"; }
die() { # CODE MESSAGE
    echo "slurm: error: $2" >&2
    exit "$1"
}
activate() {
    [ -z "$activated" ] || return 0
    set +u # module and activate scripts read unset variables
    dsvae_activate || die 2 "the environment could not be made: see dsvae_activate in slurm/site.sh"
    set -u
    activated=1
}
shown() { printf '%q ' "$@"; echo; } # a command as one could type it

# With --dry_run as its first argument, a script only prints what would run.
dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi

# Sets ANSWER to what dsvae/run_directory.py says, which reads a command line as train.py does.
# Ends the script if the command line has a mistake. Only a subshell gets the environment:
# sbatch would hand it on to the job, which makes its own.
ask() { # COMMAND WORDS...
    local python
    read -r -a python <<< "${DSVAE_HOST_PYTHON:-$DSVAE_CONTAINER $DSVAE_PYTHON}"
    mapfile -d '' -t ANSWER < <(
        activate >&2
        export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
        exec "${python[@]}" -B -m dsvae.run_directory "$@"
    )
    wait $! || wait $! || exit 2 # a signal can end the first one
}

# sbatch hands on the variables of the shell that calls it: a job that was submitted from inside an
# array has those of a member there, and would take itself for that one. SLURM's own record
# decides; if SLURM does not answer, the variables do.
forget_another_array() {
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || return 0
    if scontrol -o show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID " |
        grep -qv ' ArrayJobId='; then
        unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
    fi
}

# Copies the code to DIR/code, whole or not at all: a job that waits, or comes back, runs what it
# was submitted with. The file SNAPSHOT marks the copy. Later calls for the same DIR copy nothing.
snapshot() { # DIR
    local dir=$1 temporary
    [ -e "$dir/code/SNAPSHOT" ] && return
    mkdir -p "$dir" || return
    temporary=$(mktemp -d "$dir/.code.XXXXXX") || return
    # `dsvae slurm` writes a link to the package.
    tar -C "$code" --exclude=__pycache__ --dereference -cf - dsvae ds_configs slurm |
        tar -C "$temporary" -xf - || return
    {
        echo "of $code"
        if git -C "$code" rev-parse HEAD 2>/dev/null; then
            git -C "$code" status --short -- dsvae ds_configs slurm
        fi
    } > "$temporary/SNAPSHOT"
    chmod 755 "$temporary"
    # Of two that start at once, the second one takes the copy of the first.
    if ! mv -T "$temporary" "$dir/code" 2>/dev/null; then rm -rf "$temporary"; fi
    [ -e "$dir/code/SNAPSHOT" ]
}

# For a script that submits: sets FROZEN, a new directory beside a run with a snapshot in it, and
# FROM, the code there. In a dry run nothing is copied, and FROZEN is empty.
freeze() { # RUN
    FROZEN='' FROM=$code
    [ -z "$dry_run" ] || return 0
    FROZEN=$1/slurm/submitted-$(date +%Y%m%d-%H%M%S)-$$
    snapshot "$FROZEN" || die 2 "cannot write to $FROZEN"
    FROM=$(cd "$FROZEN/code" && pwd -P)
}
# The same for the run of a command line; sets ARGS, too, as the job gets them.
freeze_run() { # ARGS...
    ask output_dir "$@"
    freeze "${ANSWER[0]}"
    ask arguments "$FROZEN" "$FROM/ds_configs/zero2.json" "$@"
    # shellcheck disable=SC2034
    ARGS=("${ANSWER[@]}")
}

# Submits a job, sets ID and prints it. In a dry run it prints the command, and ID is the
# placeholder.
submit() { # PLACEHOLDER SBATCH_WORDS...
    ID=$1
    shift
    if [ -n "$dry_run" ]; then
        shown sbatch --parsable "$@"
    else
        ID=$(DSVAE_ROOT='' sbatch --parsable "$@") || return
        ID=${ID%%;*}
        echo "$ID"
    fi
}

# Sets OPTIONS: sbatch's options from DSVAE_*. DSVAE_PREFIX_* (two_phase.sh) come first.
sbatch_options() { # [PREFIX]
    local prefix=${1:-} name
    value() { # NAME
        name=DSVAE_${prefix:+${prefix}_}$1
        [ -n "${!name:-}" ] || name=DSVAE_$1
        printf '%s' "${!name:-}"
    }
    OPTIONS=()
    local pair gpus type ranks
    for pair in PARTITION=partition ACCOUNT=account QOS=qos CONSTRAINT=constraint NODES=nodes \
        CPUS_PER_RANK=cpus-per-task MEM=mem TIME=time; do
        if [ -n "$(value "${pair%=*}")" ]; then
            OPTIONS+=("--${pair#*=}=$(value "${pair%=*}")")
        fi
    done
    gpus=$(value GPUS_PER_NODE) type=$(value GPU_TYPE) ranks=$(value RANKS_PER_NODE)
    if [ "${gpus:-0}" -gt 0 ]; then
        case $(value GPU_OPTION) in
            gpus-per-node) OPTIONS+=("--gpus-per-node=${type:+$type:}$gpus") ;;
            gres) OPTIONS+=("--gres=gpu:${type:+$type:}$gpus") ;;
            none) ;;
            *) die 2 "DSVAE_GPU_OPTION is $(value GPU_OPTION), not gpus-per-node, gres or none" ;;
        esac
        # SLURM's own default, one, is what a rank's threads and an offloaded AdamW would share.
        [ -n "$(value CPUS_PER_RANK)" ] || OPTIONS+=("--cpus-per-task=8")
    else
        gpus=1
    fi
    OPTIONS+=("--ntasks-per-node=${ranks:-$gpus}")
    if [ -n "$(value SIGNAL_SECONDS)" ]; then
        OPTIONS+=("--signal=B:USR1@$(value SIGNAL_SECONDS)")
    fi
    read -r -a pair <<< "$(value SBATCH_ARGS)"
    OPTIONS+=("${pair[@]}")
}

# Sets NODES (names, in the order of the ranks), RANKS, PER_NODE and SRUN, and exports the place
# where the ranks meet, from the allocation.
layout() {
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    RANKS=${SLURM_NTASKS:-${#NODES[@]}}
    PER_NODE=$((RANKS / ${#NODES[@]}))
    if [ $((PER_NODE * ${#NODES[@]})) -ne "$RANKS" ] || [ "$PER_NODE" -lt 1 ]; then
        die 2 "$RANKS tasks do not divide by ${#NODES[@]} nodes: give --nodes and --ntasks-per-node"
    fi
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    if [ "$gpus" -gt 0 ] && [ "$PER_NODE" -gt "$gpus" ]; then
        die 2 "$PER_NODE tasks per node, but $gpus GPUs: ask for --ntasks-per-node=$gpus"
    elif [ "$gpus" -gt "$PER_NODE" ]; then
        say "warning: $gpus GPUs per node, but $PER_NODE task(s): GPUs stay idle;" \
            "one task per GPU is --ntasks-per-node=$gpus"
    fi
    export MASTER_ADDR=${NODES[0]}
    # Below the ports that systems assign by themselves (32768 and up). Two jobs on a node have
    # different ones.
    export MASTER_PORT=$((16000 + SLURM_JOB_ID % 8000 * 2))
    # Without --cpus-per-task, the rank's share of the processors that the node gives (--exclusive,
    # --cpus-per-gpu).
    local cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-$PER_NODE} / PER_NODE))}
    ((cpus > 0)) || cpus=1
    if [ "$gpus" -gt 0 ] && [ "$cpus" -lt 2 ]; then
        say "warning: $cpus processor for each rank, whose threads share it:" \
            "ask for more with --cpus-per-task=8"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    local more
    read -r -a more <<< "$DSVAE_SRUN_ARGS"
    # cpus-per-task: srun has not inherited it from sbatch since 22.05. kill-on-bad-exit=0: a rank
    # that leaves gives the others time to leave with an exit code of their own; --wait ends those
    # that hang. --export: `sbatch --export=NONE` would hold for srun, too.
    # shellcheck disable=SC2034
    SRUN=(srun --nodes="${#NODES[@]}" --ntasks="$RANKS" --ntasks-per-node="$PER_NODE"
        --cpus-per-task="$cpus" --distribution=block --kill-on-bad-exit=0
        --export=ALL --input=none "${more[@]}")
}
