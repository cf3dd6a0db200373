#!/usr/bin/env bash
# Which tokens are computed again: by similarity, or as a control by the reverse, the oldest, at random.
# MODEL=mar_tiny scripts/ablation_token_selection.sh runs it on the bundled model.
# More flags of eval.py may follow, but for those that the rows set; PROCESSES=8 uses eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" -m benchmarks.ablations \
    --group token_selection --model "${MODEL:-mar_huge}" "$@"
