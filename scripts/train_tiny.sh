#!/usr/bin/env bash
# Trains mar_tiny from nothing on CPUs: data, tokenizer, latents, model, bundled weights.
# Stopped anywhere, the same command goes on. PROCESSES=8 scripts/train_tiny.sh uses eight cores.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGES=${IMAGES:-40000}
PROCESSES=${PROCESSES:-2}
EPOCHS=${EPOCHS:-400}
OUT=${OUT:-output_dir/mar_tiny}
BUNDLE=pretrained_models/mar_tiny

if [ ! -f data/shapes.complete ]; then
    python -m util.shapes --output_dir data/shapes --num_images "$IMAGES"
    touch data/shapes.complete
fi
[ -f "$BUNDLE/tokenizer.safetensors" ] || python -m util.tiny_assets tokenizer
python main_cache.py --model mar_tiny --data_path data/shapes --cached_path data/shapes_latents \
    --num_workers "$PROCESSES" --device cpu

resume=()
[ -f "$OUT/checkpoint-last.pth" ] && resume=(--resume "$OUT")
# No dropout: on a CPU it costs four fifths of the speed, and the pictures are many.
torchrun --standalone --nproc_per_node="$PROCESSES" main_mar.py --model mar_tiny \
    --use_cached --cached_path data/shapes_latents --output_dir "$OUT" \
    --device cpu --dtype bf16 --threads 1 --batch_size 16 --epochs "$EPOCHS" \
    --lr 1e-3 --warmup_epochs 0.5 --ema_rate 0.999 --grad_clip 1.0 \
    --attn_dropout 0 --proj_dropout 0 --masked_keep 0.4 \
    --save_last_freq 5 --save_minutes 4 "${resume[@]}"

python -m util.checkpoint convert "$OUT" "$BUNDLE/model.safetensors"
