#!/usr/bin/env bash
# Trains gpt_tiny from nothing on one CPU core: tokenizer, codes, model, bundled weights. About 70 minutes.
# Stopped anywhere, the same command goes on. Bundled files that are there are not made again: delete both of
# pretrained_models/gpt_tiny first, for the model speaks the tokenizer's codes.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-output_dir/gpt_tiny}
BUNDLE=pretrained_models/gpt_tiny
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

[ -f "$BUNDLE/tokenizer.safetensors" ] || python -m util.tiny.vq --output_dir "$OUT/tokenizer"
[ ! -f "$BUNDLE/model.safetensors" ] || exit 0
python -m util.tiny.gpt --output_dir "$OUT/model"
