# shellcheck shell=bash
# Functions that the scripts share. Sourced after site.sh.

# All scripts pass here before they need it: mapfile -d, and empty arrays under set -u. bash reads and runs line by line, so that an
# older one comes this far.
if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
    echo "slurm: error: bash ${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]} on $(hostname) is too old: 4.4 or newer is needed, first in PATH" >&2
    exit 2
fi

say() { echo "slurm: $*"; }
die() { # CODE MESSAGE
    echo "slurm: error: $2" >&2
    exit "$1"
}
activate() { # module and activate scripts read unset variables
    set +u
    dsvae_activate
    local status=$?
    set -u
    return $status
}
shown() { printf '%q ' "$@"; echo; } # a command as one could type it

# sbatch hands on the variables of the shell that calls it: a job that was submitted from inside an array has those of a member there,
# and would take itself for that one. SLURM's own record decides; where SLURM does not answer, the variables do.
forget_another_array() {
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || return 0
    if scontrol -o show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID " | grep -qv ' ArrayJobId='; then
        unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
    fi
}

# What the first --NAME among WORDS says; fails if it is not there. train.py takes --output_dir, --output-dir and --output_dir=X alike.
flag() { # NAME WORDS...
    local name=$1 word
    shift
    while [ $# -gt 0 ]; do
        word=${1//-/_}
        if [ "$word" = "__$name" ]; then
            [ $# -gt 1 ] && printf '%s' "$2"
            return
        elif [ "${word%%=*}" = "__$name" ]; then
            printf '%s' "${1#*=}"
            return
        fi
        shift
    done
    return 1
}

top_level() { # KEY FILE: the value of a key of a YAML file, where it stands in one line; nothing for null
    # What is in quotes, up to the closing one and with its escaped quotes; else what is before a comment, which has a blank before its #.
    # \x27 is a single quote.
    sed -nE "
        s/^$1:[[:space:]]+//
        T
        s/^\x27(([^\x27]|\x27\x27)*)\x27[[:space:]]*(#.*)?\$/\1/
        t single
        s/^\"(([^\"\\\\]|\\\\.)*)\"[[:space:]]*(#.*)?\$/\1/
        t double
        s/(^|[[:space:]])#.*//
        s/[[:space:]]+\$//
        /^(null|Null|NULL|~)?\$/b
        p
        b
        :single
        s/\x27\x27/\x27/g
        p
        b
        :double
        s/\\\\([\"\\\\])/\1/g
        p" "$2" | head -n 1
}

# The directory of a run: where train.py writes with these arguments.
run_dir() { # CODE ARGS...
    local code=$1 config dir=
    shift
    if flag output_dir "$@"; then return; fi
    config=$(flag config "$@") || config=quickstart
    if [ -f "$code/dsvae/recipes/$config.yaml" ]; then
        dir=$(top_level output_dir "$code/dsvae/recipes/$config.yaml")
    elif [ -f "$config" ]; then
        dir=$(top_level output_dir "$config")
        config=$(basename "${config%.*}")
    fi
    printf '%s' "${dir:-runs/$config}"
}

# Copies code and configurations to DIR (appears whole or not at all): a job that waits, or comes back, runs what it was submitted with.
# DIR/code/SNAPSHOT marks it. Later calls for the same DIR copy nothing.
snapshot() { # CODE DIR
    local code=$1 dir=$2 temporary
    [ -e "$dir/code/SNAPSHOT" ] && return
    mkdir -p "$dir" || return
    temporary=$(mktemp -d "$dir/.code.XXXXXX") || return
    tar -C "$code" --exclude=__pycache__ -cf - dsvae ds_configs slurm | tar -C "$temporary" -xf - || return
    {
        echo "of $code"
        if git -C "$code" rev-parse HEAD 2>/dev/null; then
            git -C "$code" status --short -- dsvae ds_configs slurm
        fi
    } > "$temporary/SNAPSHOT"
    chmod 755 "$temporary"
    # Two that start at once: the second finds the first's.
    if ! mv -T "$temporary" "$dir/code" 2>/dev/null; then rm -rf "$temporary"; fi
    [ -e "$dir/code/SNAPSHOT" ]
}

# Sets ARGS: the same arguments with the files of --config and --ds_config replaced by copies in DIR, made when they are not there yet.
freeze_args() { # CODE DIR ARGS...
    local code=$1 dir=$2 word name value previous=
    shift 2
    ARGS=()
    for word in "$@"; do
        name=${word%%=*} name=${name//-/_} value=${word#*=}
        if [[ $previous =~ ^__(ds_)?config$ ]]; then
            ARGS+=("$(frozen "$code" "$dir/${previous#__}" "$word")")
        elif [[ $word == *=* && $name =~ ^__(ds_)?config$ ]]; then
            ARGS+=("${word%%=*}=$(frozen "$code" "$dir/${name#__}" "$value")")
        else
            ARGS+=("$word")
        fi
        previous=
        [[ $word == *=* ]] || previous=$name
    done
}
frozen() { # CODE DIR FILE: the name of FILE's copy in DIR; FILE itself where it is none (a recipe's name)
    local copy
    copy=$2/$(basename "$3")
    if [ ! -f "$copy" ]; then
        if [ -f "$1/dsvae/recipes/$3.yaml" ] || [ ! -f "$3" ]; then
            printf '%s' "$3"
            return
        fi
        mkdir -p "$2" && cp "$3" "$copy" || return
    fi
    printf '%s' "$copy"
}

# Sets ARGS: arguments with --output_dir, and --ds_config where neither they nor their configuration name one.
complete_args() { # CODE RUN_DIR ARGS...
    local code=$1 run=$2 config
    shift 2
    ARGS=("$@")
    flag output_dir "$@" > /dev/null || ARGS+=(--output_dir "$run")
    if ! flag ds_config "$@" > /dev/null; then
        config=$(flag config "$@") || config=
        if [ ! -f "$config" ] || [ -z "$(top_level ds_config "$config")" ]; then
            ARGS+=(--ds_config "$code/ds_configs/zero2.json")
        fi
    fi
}

# Sets OPTIONS: sbatch's options from DSVAE_*; DSVAE_PREFIX_* (two_phase.sh) come first.
sbatch_options() { # [PREFIX]
    local prefix=${1:-} name
    value() { # NAME
        name=DSVAE_${prefix:+${prefix}_}$1
        [ -n "${!name:-}" ] || name=DSVAE_$1
        printf '%s' "${!name:-}"
    }
    OPTIONS=()
    local pair gpus type ranks
    for pair in PARTITION=partition ACCOUNT=account QOS=qos CONSTRAINT=constraint NODES=nodes CPUS_PER_RANK=cpus-per-task MEM=mem TIME=time; do
        if [ -n "$(value "${pair%=*}")" ]; then OPTIONS+=("--${pair#*=}=$(value "${pair%=*}")"); fi
    done
    gpus=$(value GPUS_PER_NODE) type=$(value GPU_TYPE) ranks=$(value RANKS_PER_NODE)
    if [ "${gpus:-0}" -gt 0 ]; then
        case $(value GPU_OPTION) in
            gpus-per-node) OPTIONS+=("--gpus-per-node=${type:+$type:}$gpus") ;;
            gres) OPTIONS+=("--gres=gpu:${type:+$type:}$gpus") ;;
            none) ;;
            *) die 2 "DSVAE_GPU_OPTION is $(value GPU_OPTION), not gpus-per-node, gres or none" ;;
        esac
    else
        gpus=1
    fi
    OPTIONS+=("--ntasks-per-node=${ranks:-$gpus}")
    if [ -n "$(value SIGNAL_SECONDS)" ]; then OPTIONS+=("--signal=B:USR1@$(value SIGNAL_SECONDS)"); fi
    read -r -a pair <<< "$(value SBATCH_ARGS)"
    OPTIONS+=("${pair[@]}")
}

# Sets NODES (names, in the order of the ranks), RANKS, PER_NODE and the rendezvous, from the allocation.
layout() {
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    RANKS=${SLURM_NTASKS:-${#NODES[@]}}
    PER_NODE=$((RANKS / ${#NODES[@]}))
    if [ $((PER_NODE * ${#NODES[@]})) -ne "$RANKS" ] || [ "$PER_NODE" -lt 1 ]; then
        die 2 "$RANKS tasks do not divide by ${#NODES[@]} nodes: give --nodes and --ntasks-per-node"
    fi
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    if [ "$gpus" -gt 0 ] && [ "$PER_NODE" -gt "$gpus" ]; then
        die 2 "$PER_NODE tasks a node, but $gpus GPUs: one task a GPU (--ntasks-per-node=$gpus)"
    elif [ "$gpus" -gt "$PER_NODE" ]; then
        say "warning: $gpus GPUs a node, but $PER_NODE task(s): GPUs stay idle; one task a GPU is --ntasks-per-node=$gpus"
    fi
    export MASTER_ADDR=${NODES[0]}
    # Below the ports that systems give out by themselves (32768 and up); two jobs on a node differ in it.
    export MASTER_PORT=$((16000 + SLURM_JOB_ID % 8000 * 2))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    local more
    read -r -a more <<< "$DSVAE_SRUN_ARGS"
    # cpus-per-task: not inherited from sbatch since 22.05. kill-on-bad-exit=0: a rank that leaves gives the others time to leave with an
    # exit code of their own; --wait ends those that hang. --export: `sbatch --export=NONE` would hold for srun, too.
    # shellcheck disable=SC2034
    SRUN=(srun --nodes="${#NODES[@]}" --ntasks="$RANKS" --ntasks-per-node="$PER_NODE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
        --distribution=block --kill-on-bad-exit=0 --export=ALL --input=none "${more[@]}")
}
