# shellcheck shell=bash disable=SC2034
# What differs from cluster to cluster: the one file to adapt. Every script here reads it. A
# variable that is already set in the environment wins over its line below
# (DSVAE_TIME=1-0 slurm/submit.sh).

# ---- Resources, for slurm/submit.sh, two_phase.sh and sweep.sh. (`sbatch slurm/train.sbatch` takes
# sbatch's own options instead.) In two_phase.sh, DSVAE_PHASE1_NODES and the like, made of any of
# these, hold for one phase only.
: "${DSVAE_PARTITION:=}"          # --partition; empty: the cluster's default, here and below
: "${DSVAE_ACCOUNT:=}"            # --account
: "${DSVAE_QOS:=}"                # --qos
: "${DSVAE_CONSTRAINT:=}"         # --constraint: features of the nodes
: "${DSVAE_NODES:=1}"             # --nodes
: "${DSVAE_GPUS_PER_NODE:=0}"     # one rank per GPU; 0: ranks on CPU
: "${DSVAE_GPU_TYPE:=}"           # h100, ...; empty: any
# How the cluster wants GPUs asked for: gpus-per-node, gres, or none (whole nodes only).
: "${DSVAE_GPU_OPTION:=gpus-per-node}"
: "${DSVAE_RANKS_PER_NODE:=}"     # --ntasks-per-node; empty: one per GPU, or one per node on CPU
: "${DSVAE_CPUS_PER_RANK:=}"      # --cpus-per-task
: "${DSVAE_MEM:=}"                # --mem, per node
: "${DSVAE_TIME:=}"               # --time
: "${DSVAE_SIGNAL_SECONDS:=}"     # seconds between the save and the time limit; empty: 300
: "${DSVAE_SBATCH_ARGS:=}"        # any other sbatch options, separated by blanks

# ---- Software: the one place where the environment is made. Every rank inherits it.
: "${DSVAE_MODULES:=}"            # modules to load, separated by blanks
: "${DSVAE_VENV:=}"               # a virtual environment to activate
: "${DSVAE_CONDA:=}"              # or a conda environment (name or directory)
# Or words before python: apptainer exec --nv --bind /scratch /images/dsvae.sif
: "${DSVAE_CONTAINER:=}"
# srun options of every step, separated by blanks; for pyxis --container-image=... and
# --container-mounts=...
: "${DSVAE_SRUN_ARGS:=}"
: "${DSVAE_PYTHON:=python}"       # the interpreter
# The interpreter with which the scripts themselves read a command line, on the login node too.
# Where the one above is not there (pyxis): any Python 3.10 or newer with PyYAML.
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
    # Whatever else your cluster needs goes here, for example:
    # Compute nodes without internet (download on the login node first):
    # export HF_HOME=/scratch/$USER/hf HF_HUB_OFFLINE=1
    # export NCCL_DEBUG=INFO                                # what NCCL chose
    # Where NCCL takes the wrong network:
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    # export NCCL_IB_HCA=mlx5                               # the InfiniBand adapters
    # export NCCL_IB_DISABLE=1                              # no InfiniBand at all
    # export TORCH_NCCL_TRACE_BUFFER_SIZE=2000              # the last collectives, for hangs
}

# ---- How a job behaves.
: "${DSVAE_MAX_RESTARTS:=100}"    # a job that was restarted this often gives up
: "${DSVAE_MAX_FAILURES:=3}"      # so does one that lost a rank this often without SLURM's doing
: "${DSVAE_WAIT:=120}"            # seconds that the other ranks have to leave once one has gone
: "${DSVAE_PREFLIGHT:=1}"         # 0: no preflight before training
: "${DSVAE_PREFLIGHT_SECONDS:=120}"  # the longest that all ranks together may take to meet
: "${DSVAE_MIN_FREE_GB:=5}"       # preflight wants this much disk space at output_dir
: "${DSVAE_AT_ONCE:=4}"           # sweep.sh: runs at a time
: "${DSVAE_LOGIN_NODE:=}"         # tensorboard.sbatch: the host that you log in to
