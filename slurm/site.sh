# shellcheck shell=bash disable=SC2034
# The settings that differ between clusters: the one file to adapt. Every script here reads it. A
# variable that is already set in the environment wins over its line below
# (DSVAE_TIME=1-0 slurm/submit.sh).

# ---- Resources, for slurm/submit.sh, two_phase.sh and sweep.sh. (`sbatch slurm/train.sbatch` takes
# sbatch's own options instead.) In two_phase.sh, a name such as DSVAE_PHASE1_NODES sets one of
# these variables for one phase only.
: "${DSVAE_PARTITION:=}"          # --partition; empty: the cluster's default, here and below
: "${DSVAE_ACCOUNT:=}"            # --account
: "${DSVAE_QOS:=}"                # --qos
: "${DSVAE_CONSTRAINT:=}"         # --constraint: features of the nodes
: "${DSVAE_NODES:=1}"             # --nodes
: "${DSVAE_GPUS_PER_NODE:=0}"     # one rank per GPU; 0: ranks on CPU
: "${DSVAE_GPU_TYPE:=}"           # h100, ...; empty: any
# The sbatch option that requests GPUs: gpus-per-node, gres, or none (whole nodes only).
: "${DSVAE_GPU_OPTION:=gpus-per-node}"
: "${DSVAE_RANKS_PER_NODE:=}"     # --ntasks-per-node; empty: one per GPU, or one per node on CPU
: "${DSVAE_CPUS_PER_RANK:=}"      # --cpus-per-task; empty: 8 with GPUs, otherwise SLURM's default
: "${DSVAE_MEM:=}"                # --mem, per node
: "${DSVAE_TIME:=}"               # --time
: "${DSVAE_SIGNAL_SECONDS:=}"     # seconds between the save and the time limit; empty: 300
: "${DSVAE_SBATCH_ARGS:=}"        # any other sbatch options, separated by blanks

# ---- Software: the environment is set up here and nowhere else. Every rank inherits it.
: "${DSVAE_MODULES:=}"            # modules to load, separated by blanks
: "${DSVAE_VENV:=}"               # a virtual environment to activate
: "${DSVAE_CONDA:=}"              # or a conda environment (name or directory)
# Or a command in front of python: apptainer exec --nv --bind /scratch /images/dsvae.sif
: "${DSVAE_CONTAINER:=}"
# srun options for every step, separated by blanks; for pyxis: --container-image=... and
# --container-mounts=...
: "${DSVAE_SRUN_ARGS:=}"
: "${DSVAE_PYTHON:=python}"       # the interpreter
# The interpreter with which the scripts read a command line, also on the login node. Set it if
# the one above exists only inside jobs (pyxis), to any Python 3.10 or newer with PyYAML.
: "${DSVAE_HOST_PYTHON:=}"

dsvae_activate() {
    if [ -n "$DSVAE_MODULES" ]; then
        # shellcheck disable=SC2086  # a list
        module load $DSVAE_MODULES || return
    fi
    if [ -n "$DSVAE_CONDA" ]; then
        eval "$(conda shell.bash hook)" && conda activate "$DSVAE_CONDA" || return
    fi
    if [ -n "$DSVAE_VENV" ]; then
        # shellcheck disable=SC1091
        . "$DSVAE_VENV/bin/activate" || return
    fi
    # Put whatever else your cluster needs here, for example:
    # For compute nodes without internet (download on the login node first):
    # export HF_HOME=/scratch/$USER/hf HF_HUB_OFFLINE=1
    # export NCCL_DEBUG=INFO                                # prints what NCCL chose
    # If NCCL takes the wrong network:
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    # export NCCL_IB_HCA=mlx5                               # the InfiniBand adapters
    # export NCCL_IB_DISABLE=1                              # no InfiniBand at all
    # export TORCH_NCCL_TRACE_BUFFER_SIZE=2000              # the last collectives, for hangs
}

# ---- How a job behaves.
: "${DSVAE_MAX_RESTARTS:=100}"    # at most this many restarts of a job
: "${DSVAE_MAX_FAILURES:=3}"      # at most this many after a lost rank; SLURM's own do not count
: "${DSVAE_WAIT:=120}"            # seconds that the other ranks have to leave after one has left
: "${DSVAE_PREFLIGHT:=1}"         # 0: no preflight before training
: "${DSVAE_PREFLIGHT_SECONDS:=120}"  # seconds for all ranks to meet; a collective has 30 more
: "${DSVAE_MIN_FREE_GB:=5}"       # free disk space that preflight requires at output_dir
: "${DSVAE_AT_ONCE:=4}"           # sweep.sh: at most this many runs at a time
: "${DSVAE_LOGIN_NODE:=}"         # tensorboard.sbatch: the host that you log in to
