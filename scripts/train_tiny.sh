#!/usr/bin/env bash
# Trains mar_tiny from nothing on CPUs: data, tokenizer, latents, model, bundled weights. About an hour on two
# cores. Stopped anywhere, the same command goes on. PROCESSES=8 scripts/train_tiny.sh uses eight cores.
# Bundled files that are there stay: from nothing means with both of pretrained_models/mar_tiny deleted.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGES=${IMAGES:-20000}
PROCESSES=${PROCESSES:-2}
EPOCHS=${EPOCHS:-10}         # at the constant learning rate
DECAY_EPOCHS=${DECAY_EPOCHS:-4}
OUT=${OUT:-output_dir/mar_tiny}
DATA=${DATA:-data/shapes}
BUNDLE=pretrained_models/mar_tiny
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -f "$DATA.complete" ]; then
    python -m util.shapes --output_dir "$DATA" --num_images "$IMAGES"
    touch "$DATA.complete"
fi
[ -f "$BUNDLE/tokenizer.safetensors" ] || python -m util.tiny.assets tokenizer
python main_cache.py --model mar_tiny --data_path "$DATA" --cached_path "${DATA}_latents" --device cpu

train() { # flags of one phase; goes on where an earlier call stopped
    local resume=()
    [ -f "$OUT/checkpoint-last.pth" ] && resume=(--resume "$OUT")
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node="$PROCESSES" main_mar.py --model mar_tiny \
        --use_cached --cached_path "${DATA}_latents" --output_dir "$OUT" \
        --device cpu --dtype bf16 --threads 1 --batch_size $((32 / PROCESSES)) \
        --lr 1.5e-3 --ema_rate 0.999 --grad_clip 1.0 --attn_dropout 0 --proj_dropout 0 \
        --pos_init sincos --mask_ratio_min 0.3 --save_minutes 3 --log_freq 50 "$@" "${resume[@]}"
}

# First context, quickly: few decoded tokens and a plain regression of them beside the diffusion loss.
train --epochs "$EPOCHS" --warmup_epochs 0.5 --masked_keep 0.4 --aux_weight 1
# Then down to a learning rate of zero, closer to the task itself (a warm-up that has ended starts the cosine).
train --epochs $((EPOCHS + DECAY_EPOCHS)) --warmup_epochs "$EPOCHS" --lr_schedule cosine \
    --masked_keep 0.7 --aux_weight 0.2

python -m util.checkpoint convert "$OUT" "$OUT/model.safetensors" --ema --overwrite
if [ -f "$BUNDLE/model.safetensors" ]; then
    echo "$BUNDLE/model.safetensors is there and stays; try this one: eval.py --model mar_tiny --resume $OUT"
else
    cp "$OUT/model.safetensors" "$BUNDLE/model.safetensors"
fi
