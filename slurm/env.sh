# Site settings: the one file here to change. Source it before sbatch, which reads SBATCH_*; the jobs source it again.

# What sbatch asks for. Numbers of nodes and time limits go on its command line: sbatch --nodes=2 --time=12:00:00 ...
#export SBATCH_ACCOUNT=my-account
#export SBATCH_PARTITION=gpu
export SBATCH_GPUS_PER_NODE=8
export SBATCH_EXCLUSIVE=user         # nobody else on the nodes; unset where jobs share them

# One task per device.
export ESI_DS_TASKS_PER_NODE=8

# Software on the nodes.
#module load cuda/12.8
source "${ESI_DS_VENV:-.venv}/bin/activate"

# A folder all nodes see, for models and data sets; compute nodes without a network need the last line.
#export HF_HOME=$SCRATCH/huggingface
#export HF_HUB_OFFLINE=1

# NCCL. The interface is found from rank 0's address where it is not named.
#export NCCL_SOCKET_IFNAME=ib0
#export NCCL_DEBUG=WARN
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
