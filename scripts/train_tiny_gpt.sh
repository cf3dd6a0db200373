#!/usr/bin/env bash
# Train gpt_tiny from scratch on one CPU core: tokenizer, codes, model. About 70 minutes. Run the same command
# again to resume. Bundled files that exist are kept: delete both in pretrained_models/gpt_tiny first, because
# the model only works with the tokenizer that it was trained with.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-output_dir/gpt_tiny}
BUNDLE=pretrained_models/gpt_tiny
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1

[ -f "$BUNDLE/tokenizer.safetensors" ] || python -m util.tiny.vq --output_dir "$OUT/tokenizer"
[ ! -f "$BUNDLE/model.safetensors" ] || exit 0
python -m util.tiny.gpt --output_dir "$OUT/model"
