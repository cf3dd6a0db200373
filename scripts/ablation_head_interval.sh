#!/usr/bin/env bash
# Head interval: denoising steps from one full one to the next.
# MODEL=mar_tiny scripts/ablation_head_interval.sh runs it on the bundled model.
# More flags of eval.py may follow, but for those that the rows set; PROCESSES=8 uses eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" -m benchmarks.ablations \
    --group head_interval --model "${MODEL:-mar_huge}" "$@"
