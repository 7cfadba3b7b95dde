#!/usr/bin/env bash
# A real SLURM cluster on one machine, without systemd: a controller and two nodes, each in namespaces of its own (network, hostname,
# processes, mounts), joined by a bridge. Needs root (CAP_SYS_ADMIN), slurmctld slurmd slurm-client munge iproute2.
#
#   lab.sh run                  start it, print READY; everything ends at EOF on stdin, or when this process dies
#   lab.sh exec CMD...          run a client (sbatch, scontrol ...) on the controller
#   lab.sh node-exec NODE CMD.. run a command on a node, outside any job
#   lab.sh kill-node NODE       SIGKILL for slurmd and everything that runs on the node, which SLURM then knows to be down
#   lab.sh start-node NODE      boot it again
#   lab.sh stop                 end it and remove its directory
#
# LAB_DIR: a directory that is not there (short: munge's socket path is limited to 108 bytes). Memory, CPUs and GPUs are claimed, not
# enforced; GPUs are character devices that are none.
set -u
export PATH="$PATH:/usr/sbin:/sbin"
SELF=$(readlink -f "$0")
L=${LAB_DIR:?}
NODES=(node1 node2) CPUS=8 GPUS=2 NET=10.77.0
die() { echo "lab: $*" >&2; exit 1; }

write_conf() {
    local i
    mkdir -p "$L"/{etc,state,log,munge,dev} || die "cannot write $L"
    chmod 755 "$L" "$L/munge"
    (umask 077 && head -c 1024 /dev/urandom > "$L/munge/key")
    # Before 24.05 there is no "disabled"; cgroup/v1 named outright is loaded, but touches nothing with the plugins below.
    if [ "$(printf '%s\n' 24.05 "$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)" | sort -V | head -n 1)" = 24.05 ]; then
        echo "CgroupPlugin=disabled"
    else
        echo "CgroupPlugin=cgroup/v1"
    fi > "$L/etc/cgroup.conf"
    cat > "$L/etc/slurm.conf" << CONF
ClusterName=lab
SlurmctldHost=ctl($NET.254)
SlurmctldPort=6817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$L/munge/sock
StateSaveLocation=$L/state
SlurmdSpoolDir=$L/spool.%n
SlurmctldPidFile=$L/slurmctld.pid
SlurmdPidFile=$L/slurmd.%n.pid
SlurmctldLogFile=$L/log/slurmctld.log
SlurmdLogFile=$L/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=300
InactiveLimit=0
KillWait=20
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=9
CONF
    for i in "${!NODES[@]}"; do
        echo "NodeName=${NODES[i]} NodeHostname=${NODES[i]} NodeAddr=$NET.$((i + 1)) Port=6818 CPUs=$CPUS RealMemory=8000 Gres=gpu:$GPUS State=UNKNOWN" >> "$L/etc/slurm.conf"
        mkdir -p "$L/spool.${NODES[i]}"
    done
    for i in $(seq 0 $((GPUS - 1))); do mknod "$L/dev/nvidia$i" c 1 3 || die "no character device in $L"; done
    echo "Name=gpu File=$L/dev/nvidia[0-$((GPUS - 1))]" > "$L/etc/gres.conf"
    # No DNS: a resolver that cannot be reached costs torch 10 s a lookup.
    { grep -v '^hosts:' /etc/nsswitch.conf; echo "hosts: files"; } > "$L/etc/nsswitch.conf"
    {
        printf '%s\n' "127.0.0.1 localhost" "::1 localhost" "$NET.254 ctl"
        for i in "${!NODES[@]}"; do echo "$NET.$((i + 1)) ${NODES[i]}"; done
    } > "$L/etc/hosts"
}

daemon() { # NAME COMMAND...: a child of this shell
    local name=$1
    shift
    "$@" > "$L/log/$name.out" 2>&1 < /dev/null &
}

init() { # pid 1 of the lab
    mount --make-rprivate /
    hostname ctl
    mount --bind "$L/etc/hosts" /etc/hosts
    mount --bind "$L/etc/nsswitch.conf" /etc/nsswitch.conf
    mkdir -p /etc/slurm /run/netns && mount --bind "$L/etc" /etc/slurm && mount -t tmpfs tmpfs /run/netns
    ip link set lo up
    if ! { ip link add br0 type bridge && ip addr add $NET.254/24 dev br0 && ip link set br0 up; }; then die "no bridge"; fi
    daemon munged munged --foreground --force --key-file="$L/munge/key" --socket="$L/munge/sock" \
        --pid-file="$L/munge/pid" --log-file="$L/munge/log" --seed-file="$L/munge/seed"
    local node
    for _ in $(seq 600); do [ ! -S "$L/munge/sock" ] || break; sleep 0.05; done
    export SLURM_CONF=$L/etc/slurm.conf
    daemon slurmctld slurmctld -D -c -f "$SLURM_CONF"
    for node in "${NODES[@]}"; do boot "$node"; done
    touch "$L/up"
    cat > /dev/null <&3 # EOF: pid 1 goes, and everything with it
}
boot() { # NODE, from the controller's namespaces
    local node=$1 i=${1#node}
    ip netns del "$node" 2> /dev/null
    ip link del "v$node" 2> /dev/null
    ip netns add "$node" || die "no network for $node"
    ip link add "v$node" type veth peer name eth0 netns "$node" || die "no veth for $node"
    ip link set "v$node" master br0 up
    ip -n "$node" addr add "$NET.$i/24" dev eth0 && ip -n "$node" link set eth0 up && ip -n "$node" link set lo up
    setsid nsenter --net="/run/netns/$node" unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc \
        "$SELF" _node "$node" > "$L/log/$node.init" 2>&1 < /dev/null 3<&- &
}
init_node() { # pid 1 of a node
    hostname "$1"
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    export SLURM_CONF=$L/etc/slurm.conf
    daemon "slurmd.$1" slurmd -D -N "$1" -f "$SLURM_CONF"
    while :; do sleep 3600 & wait $!; done
}
holder() { # NODE: the unshare that holds its processes, as seen here
    local p
    for p in /proc/[0-9]*; do
        if tr '\0' ' ' < "$p/cmdline" 2> /dev/null | grep -qE "^unshare .* _node $1 "; then echo "${p#/proc/}"; fi
    done
}
first_child() { tr ' ' '\n' < "/proc/$1/task/$1/children" | grep -m 1 .; }

alive() { [ -e "$L/outer.pid" ] && [ -e "/proc/$(cat "$L/outer.pid")" ]; }
enter() {
    local p
    p=$(first_child "$(cat "$L/outer.pid")") || die "the lab is not running"
    SLURM_CONF=$L/etc/slurm.conf nsenter -t "$p" --mount --net --uts --ipc --pid --root --wdns="$PWD" "$@"
}

cmd=${1:-}
[ $# -eq 0 ] || shift
case $cmd in
    run)
        [ ! -e "$L" ] || die "$L exists"
        write_conf
        exec 3<&0 # an asynchronous command's own stdin is /dev/null
        setsid unshare --mount --net --uts --ipc --pid --fork --kill-child --mount-proc "$SELF" _init > "$L/log/init" 2>&1 < /dev/null &
        echo $! > "$L/outer.pid"
        exec 0< /dev/null 3<&-
        disown # its end is no news
        for _ in $(seq 1200); do
            alive || { cat "$L"/log/init >&2; die "the lab died at its start"; }
            if [ -e "$L/up" ] && [ "$(enter timeout 5 sinfo -h -N -o '%N %t' 2> /dev/null | sort -u | grep -c ' idle$')" = ${#NODES[@]} ]; then
                echo READY
                while alive; do sleep 0.2; done
                exit
            fi
            sleep 0.1
        done
        tail -n 20 "$L"/log/* >&2
        die "the nodes are not idle after 120 s" ;;
    exec) enter "$@" ;;
    node-exec | kill-node | start-node) enter "$SELF" "_$cmd" "$@" ;;
    stop)
        if alive; then kill -9 "$(cat "$L/outer.pid")"; fi
        for _ in $(seq 100); do alive || break; sleep 0.1; done
        rm -rf "$L" ;;
    _init) init ;;
    _node) init_node "$1" ;;
    _node-exec)
        node=$1
        shift
        p=$(holder "$node")
        [ -n "$p" ] || die "$node is not up"
        exec nsenter -t "$(first_child "$p")" --mount --net --uts --ipc --pid --root --wdns="$PWD" "$@" ;;
    _kill-node)
        # shellcheck disable=SC2046
        kill -9 $(holder "$1")
        ip netns del "$1"
        ip link del "v$1" 2> /dev/null
        # What SLURM does by itself after SlurmdTimeout, which is long here: a busy machine is no lost node.
        scontrol update "nodename=$1" state=down reason=killed ;;
    _start-node)
        boot "$1"
        scontrol update "nodename=$1" state=resume ;;
    *) sed -n '2,16p' "$SELF" && exit 2 ;;
esac
