#!/usr/bin/env bash
# Trains mar_tiny from nothing on CPUs: data, tokenizer, latents, model, bundled weights.
# Stopped anywhere, the same command goes on. THREADS=8 scripts/train_tiny.sh uses eight cores.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGES=${IMAGES:-40000}
THREADS=${THREADS:-2}
OUT=${OUT:-output_dir/mar_tiny}
BUNDLE=pretrained_models/mar_tiny

if [ ! -f data/shapes/complete ]; then
    rm -rf data/shapes
    python -m util.shapes --output_dir data/shapes --num_images "$IMAGES"
    touch data/shapes/complete
fi
[ -f "$BUNDLE/tokenizer.safetensors" ] || python -m util.tiny_assets tokenizer
python main_cache.py --model mar_tiny --data_path data/shapes --cached_path data/shapes_latents \
    --num_workers "$THREADS" --device cpu

resume=()
[ -f "$OUT/checkpoint-last.pth" ] && resume=(--resume "$OUT")
# Dropout off: it doubles the time on a CPU, and the pictures never run out.
python main_mar.py --model mar_tiny --use_cached --cached_path data/shapes_latents \
    --output_dir "$OUT" --device cpu --dtype bf16 --threads "$THREADS" \
    --batch_size 64 --epochs 20 --warmup_epochs 1 --lr_schedule cosine --blr 1e-3 \
    --ema_rate 0.999 --attn_dropout 0 --proj_dropout 0 \
    --save_last_freq 1 --save_minutes 5 "${resume[@]}"

python -m util.checkpoint convert "$OUT" "$BUNDLE/model.safetensors"
