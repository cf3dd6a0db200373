#!/usr/bin/env bash
#SBATCH --job-name=lazymar-eval
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
# An evaluation on several machines: sbatch scripts/eval_slurm.sh --num_images 50000 --eval_bsz 128 --lazy_mar
# Submit it from the top of the repository, on a file system that all machines share. The arguments are those
# of eval.py. If the time limit ends it, submit the same command again to resume.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

MACHINES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export RENDEZVOUS="${MACHINES%%$'\n'*}:${PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
export PATH="$PWD/.venv/bin:$PATH"

read -r -d '' ON_EACH_MACHINE <<'END' || true
torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$PROCESSES" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" eval.py "$@"
END
srun --kill-on-bad-exit=0 bash -c "$ON_EACH_MACHINE" eval.py "$@"
