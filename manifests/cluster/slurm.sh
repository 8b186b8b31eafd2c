#!/usr/bin/env bash
# One dataset on Slurm: `sbatch manifests/cluster/slurm.sh INPUT OUT [more options of sdd dataset]`, from the folder
# whose .venv has this project. OUT is a bucket, or a folder that all nodes share. To go on after a stop, or after the
# job's time is up, submit the same command again.
#SBATCH --job-name=subject-diffusion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail
input=$1 out=$2
shift 2
source .venv/bin/activate
# Models are downloaded once to a node's own disk, from where all of its actors load them.
export HF_HOME=${HF_HOME:-${TMPDIR:-/tmp}/huggingface}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes%%$'\n'*}  # the first
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not meet
# Starts Ray on every node, runs the command on the first, and ends Ray with it.
exec srun ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_NNODES" -- \
  sdd dataset --recipe sdd --input "$input" --out "$out" --ray-address auto "$@"
