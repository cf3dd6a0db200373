#!/usr/bin/env bash
# Train mar_tiny from scratch on CPUs: data, tokenizer, latents, model. A few hours on two cores. Run the same
# command again to resume. PROCESSES=8 scripts/train_tiny.sh uses eight cores.
# Bundled files that exist are kept: delete pretrained_models/mar_tiny/*.safetensors to train them again.
set -euo pipefail
cd "$(dirname "$0")/.."

IMAGES=${IMAGES:-20000}
PROCESSES=${PROCESSES:-2}
EPOCHS=${EPOCHS:-10}             # at the constant learning rate
DECAY_EPOCHS=${DECAY_EPOCHS:-8}  # down to zero
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

train() { # folder, flags of one phase; resumes if the folder has a checkpoint
    local folder=$1 resume=()
    shift
    [ -f "$folder/checkpoint-last.pth" ] && resume=(--resume "$folder")
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node="$PROCESSES" main_mar.py --model mar_tiny \
        --use_cached --cached_path "${DATA}_latents" --output_dir "$folder" \
        --device cpu --threads 1 --batch_size $((32 / PROCESSES)) \
        --lr 1.5e-3 --ema_rate 0.999 --grad_clip 1.0 --attn_dropout 0 --proj_dropout 0 \
        --pos_init sincos --mask_ratio_min 0.3 --save_minutes 3 --log_freq 50 "$@" "${resume[@]}"
}

# First phase, fast: few decoded tokens, and a regression loss besides the diffusion loss.
FIRST=(--epochs "$EPOCHS" --warmup_epochs 0.5 --masked_keep 0.4 --aux_weight 1)
# Second phase: the learning rate falls to zero; more tokens and noise draws for the head.
SECOND=(--epochs $((EPOCHS + DECAY_EPOCHS)) --warmup_epochs "$EPOCHS" --lr_schedule cosine
    --masked_keep 0.5 --diffusion_batch_mul 2 --aux_weight 0.2)

# Is bf16 or float32 faster on this processor? Time 200 steps of each.
mkdir -p "$OUT"
if [ ! -f "$OUT/dtype" ]; then
    for dtype in float32 bf16; do
        rm -rf "$OUT/timing"
        began=$(date +%s%N)
        train "$OUT/timing" "${FIRST[@]}" --max_steps 200 --dtype "$dtype"
        echo "$(($(date +%s%N) - began)) $dtype"
    done | tee /dev/stderr | grep -E '^[0-9]+ (float32|bf16)$' | sort -n | head -n 1 | cut -d ' ' -f 2 >"$OUT/dtype.part"
    rm -rf "$OUT/timing"
    mv "$OUT/dtype.part" "$OUT/dtype"
fi
DTYPE=$(cat "$OUT/dtype")

train "$OUT" "${FIRST[@]}" --dtype "$DTYPE"
train "$OUT" "${SECOND[@]}" --dtype "$DTYPE"

python -m util.checkpoint convert "$OUT" "$OUT/model.safetensors" --ema --overwrite
if [ -f "$BUNDLE/model.safetensors" ]; then
    echo "$BUNDLE/model.safetensors exists and is kept; try this one: eval.py --model mar_tiny --resume $OUT"
else
    cp "$OUT/model.safetensors" "$BUNDLE/model.safetensors"
    cp "$OUT/log.jsonl" "$BUNDLE/log.jsonl"
fi
