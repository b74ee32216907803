# Site settings: the only file here to change. Source it before sbatch, which reads SBATCH_*; jobs source it again.
# shellcheck shell=bash

# What sbatch requests. Node counts and time limits go on its command line: sbatch --nodes=2 --time=12:00:00 ...
#export SBATCH_ACCOUNT=my-account
#export SBATCH_PARTITION=gpu
export SBATCH_GPUS_PER_NODE=8
# Whole nodes, with all their cores and memory. If jobs share nodes, use the second line: cores and memory per GPU.
export SBATCH_EXCLUSIVE=exclusive SBATCH_MEM_PER_NODE=0
#export SBATCH_CPUS_PER_GPU=12 SBATCH_MEM_PER_GPU=120G

# One task per device: the number above, 8 of h100:8. If you request GPUs in another way, write the number here.
export ESI_DS_TASKS_PER_NODE=${SBATCH_GPUS_PER_NODE##*:}

# Software on the nodes: load the modules of your site's Python here. CUDA's libraries come with torch.
# The environment that has esi_ds: ESI_DS_VENV, or .venv in this folder, or what is active already.
if [[ -n ${ESI_DS_VENV:-} || -f .venv/bin/activate ]]; then
    source "${ESI_DS_VENV:-.venv}/bin/activate"
fi

# A folder that all nodes see, for models and data sets. Where compute nodes have no network, the last line keeps jobs,
# and not this shell, from asking the hub (docs/cluster.md: what to download before).
#export HF_HOME=$SCRATCH/huggingface
#[[ -z ${SLURM_JOB_ID:-} ]] || export HF_HUB_OFFLINE=1

# NCCL chooses a network interface itself; name one if it chooses wrongly. The interface for gloo, which CPUs use, is
# derived from rank 0's address; GLOO_SOCKET_IFNAME overrides it.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_DEBUG=WARN
# A rank computes with a thread on each of its cores, or with as many as this says.
#export OMP_NUM_THREADS=8
