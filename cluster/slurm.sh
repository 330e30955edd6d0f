#!/usr/bin/env bash
#SBATCH --job-name=portllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=portllm-%j.log
#SBATCH --requeue

# A study on Slurm: sbatch cluster/slurm.sh STUDY [options of portllm run], from the project's folder, which every node
# must see, with .venv made by `make env`. The store must be on a file system that every node sees. A job that ends at
# its time limit, or is requeued, goes on where it was: what is published is skipped.
set -euo pipefail

if [ $# -eq 0 ]; then
	echo "usage: sbatch cluster/slurm.sh STUDY [options of portllm run]" >&2
	exit 2
fi
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"

# Nodes that share a file system start slowly together: 30 s, the default, is too short to import Ray on all of them.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-600}"
# One token for this job: other users of these nodes cannot reach its cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')"
# Two jobs may share a node: a port of the job's own.
port=$((20000 + SLURM_JOB_ID % 20000))

# Every node runs the same line: the first becomes the head and runs the study, the others end with it.
# srun takes no CPUs per task over from sbatch (Slurm 22.05 and later).
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
	ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
	--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
	-- python jobs/ray_job.py "$@"
