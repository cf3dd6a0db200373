#!/usr/bin/env bash
# MAR-L, 256 steps, guidance 3.0 (Li et al. 2024).
# Published: FID 1.78, IS 296.0.
# More flags of eval.py may follow; PROCESSES=8 uses eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" eval.py --model mar_large --num_images 50000 \
    --num_iter 256 --cfg 3.0 --eval_bsz 256 "$@"
