#!/bin/bash
#SBATCH --job-name=vlm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
# Train on several machines: one torchrun on each, which starts one process for each GPU.
#
#   sbatch examples/scale/slurm.sh MODEL --data DATA --output OUT --max-steps 10000 …
#
# A run that Slurm ends goes on with its last checkpoint if you submit the same command again, or with --requeue.
set -euo pipefail

nodes=${SLURM_NNODES:-1}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | sed -n 1p)
port=$((20000 + ${SLURM_JOB_ID:-0} % 10000))

# --kill-on-bad-exit: where one machine fails, the others do not wait for it.
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
    --nnodes "$nodes" --nproc-per-node "$per_node" \
    --rdzv-id "vlm-${SLURM_JOB_ID:-0}" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    -m vlm_cli train "$@"
