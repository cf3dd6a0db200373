#!/usr/bin/env bash
# Run one ablation of LazyMAR: scripts/ablation.sh caches [flags of eval.py]
# --list shows all ablations, "all" runs them. MODEL=mar_tiny takes the bundled model; PROCESSES=8 uses
# eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

if [ "${1:---list}" = --list ]; then
    exec python -m benchmarks.ablation_rows
fi
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" -m benchmarks.ablations \
    --group "$1" --model "${MODEL:-mar_huge}" "${@:2}"
