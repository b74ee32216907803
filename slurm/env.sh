# Site settings: the one file here to change. Source it before sbatch, which reads SBATCH_*; the jobs source it again.

# What sbatch asks for. Numbers of nodes and time limits go on its command line: sbatch --nodes=2 --time=12:00:00 ...
#export SBATCH_ACCOUNT=my-account
#export SBATCH_PARTITION=gpu
export SBATCH_GPUS_PER_NODE=8
# Whole nodes, with all their cores and memory. Where jobs share nodes, ask for a GPU's share instead: the second line.
export SBATCH_EXCLUSIVE=exclusive SBATCH_MEM_PER_NODE=0
#export SBATCH_CPUS_PER_GPU=12 SBATCH_MEM_PER_GPU=120G

# One task per device.
export ESI_DS_TASKS_PER_NODE=8

# Software on the nodes.
#module load cuda/12.8
source "${ESI_DS_VENV:-.venv}/bin/activate"

# A folder all nodes see, for models and data sets; compute nodes without a network need the last line.
#export HF_HOME=$SCRATCH/huggingface
#export HF_HUB_OFFLINE=1

# NCCL looks for a network interface itself; name one where it takes the wrong one. gloo's, which CPUs use, is found from
# rank 0's address; GLOO_SOCKET_IFNAME names another.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
