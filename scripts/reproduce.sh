#!/usr/bin/env bash
# Reproduce one published row: scripts/reproduce.sh lazymar_huge [flags of eval.py]
# --list shows all rows with their published numbers. PROCESSES=8 uses eight GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

if [ "${1:---list}" = --list ]; then
    exec python -m engine.published
fi
FLAGS=$(python -m engine.published "$1")
# shellcheck disable=SC2086  # FLAGS is a list of words
torchrun --standalone --nproc_per_node="${PROCESSES:-1}" eval.py $FLAGS "${@:2}"
