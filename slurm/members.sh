# shellcheck shell=bash
# The members of a sweep: lines of a list, each the arguments of a run. Sourced after lib.sh.

# Sets LINES: the lines of a list that are members.
members_lines() { # LIST
    [ -f "$1" ] || { echo "slurm: error: no list of runs at $1" >&2 && return 1; }
    mapfile -t LINES < <(grep -v '^[[:space:]]*\(#.*\)\?$' "$1")
    [ ${#LINES[@]} -gt 0 ] || { echo "slurm: error: $1 has no line with a run" >&2 && return 1; }
}

# Sets MEMBER: the arguments of train.py for member INDEX, from 1, with its output_dir; and RUN_DIR.
member() { # CODE LIST INDEX ARGS...
    local code=$1 list=$2 index=$3 words name
    shift 3
    members_lines "$list" || return
    if [ "$index" -lt 1 ] || [ "$index" -gt ${#LINES[@]} ]; then
        echo "slurm: error: $list has ${#LINES[@]} runs, none is $index" >&2
        return 1
    fi
    # xargs knows quotes as the shell does, and expands and runs nothing.
    mapfile -d '' -t words < <(printf '%s\n' "${LINES[index - 1]}" | xargs printf '%s\0')
    [ ${#words[@]} -gt 0 ] || { echo "slurm: error: $list, run $index: quotes do not match" >&2 && return 1; }
    MEMBER=("$@" "${words[@]}")
    if ! flag output_dir "${MEMBER[@]}" > /dev/null; then
        name=$(printf '%s_' "${words[@]}" | sed 's/--//g; s/_$//; s/[^A-Za-z0-9._-]/-/g' | cut -c 1-120)
        list=$(basename "$list")
        MEMBER+=(--output_dir "runs/${list%.*}/$name")
    fi
    # shellcheck disable=SC2034
    RUN_DIR=$(run_dir "$code" "${MEMBER[@]}")
}

# Sets RUN_DIRS: where the members write, in the order of the list.
members() { # CODE LIST ARGS...
    local code=$1 list=$2 index count
    shift 2
    members_lines "$list" || return
    count=${#LINES[@]}
    RUN_DIRS=()
    for index in $(seq "$count"); do
        member "$code" "$list" "$index" "$@" || return
        RUN_DIRS+=("$RUN_DIR")
    done
    if [ "$(printf '%s\n' "${RUN_DIRS[@]}" | sort -u | wc -l)" -ne "$count" ]; then
        echo "slurm: error: two runs of $list write to the same output_dir" >&2
        return 1
    fi
}
