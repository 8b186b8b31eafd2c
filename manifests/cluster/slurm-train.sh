#!/usr/bin/env bash
# One training run on Slurm: `sbatch manifests/cluster/slurm-train.sh DATA OUT [more options of sdd train]`, from the
# folder whose .venv has this project. OUT is a bucket, or a folder that all nodes share. To go on after a stop, or after
# the job's time is up, submit the same command again.
#SBATCH --job-name=subject-diffusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
data=$1 out=$2
shift 2
source .venv/bin/activate
# Models are downloaded once to a node's own disk, from where all of its processes load them.
export HF_HOME=${HF_HOME:-${TMPDIR:-/tmp}/huggingface}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}  # the first
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not meet
gpus=${SLURM_GPUS_PER_NODE##*:}  # "8" or "h100:8"
# When a process dies, torchrun starts all of them again, which go on from the last checkpoint.
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID" -m sdd \
  train --recipe subject-diffusion --data "$data" --out "$out" --set run.workers=$((SLURM_NNODES * gpus)) "$@"
