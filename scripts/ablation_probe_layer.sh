#!/usr/bin/env bash
# Probe layer: the decoder layer that tells which tokens changed.
# MODEL=mar_tiny scripts/ablation_probe_layer.sh runs it on the bundled model.
# More flags of eval.py may follow, but for those that the rows set; PROCESSES=8 uses eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" -m benchmarks.ablations \
    --group probe_layer --model "${MODEL:-mar_huge}" "$@"
