#!/usr/bin/env bash
# Train janus_tiny from scratch on one CPU core: prompt classifier, tokenizer, model. One to two hours.
# Run the same command again to resume. Bundled files that exist are kept. The model only works with the tokenizer that it was
# trained with: to train both again, delete the output folder and pretrained_models/janus_tiny first.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-output_dir/janus_tiny}
BUNDLE=pretrained_models/janus_tiny
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$OUT"
{
  echo "$(date -u +%FT%TZ) $0, commit $(git rev-parse --short HEAD), $OMP_NUM_THREADS thread(s)"
  [ -f "$BUNDLE/prompt_classifier.safetensors" ] || python -m util.tiny.prompt_classifier
  [ -f "$OUT/tokenizer/tokenizer.safetensors" ] || python -m util.tiny.janus_vq --output_dir "$OUT/tokenizer"
  echo "$(date -u +%FT%TZ) tokenizer trained"
  [ -f "$BUNDLE/model.safetensors" ] ||
    python -m util.tiny.janus --output_dir "$OUT/model" --tokenizer "$OUT/tokenizer/tokenizer.safetensors"
  echo "$(date -u +%FT%TZ) model trained"
} 2>&1 | tee -a "$OUT/training.log"
cp "$OUT/training.log" "$BUNDLE/training.log"
