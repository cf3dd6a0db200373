#!/usr/bin/env bash
# The tables and pictures of LineAR on text-to-image, on the bundled janus_tiny, and the same numbers of gpt_tiny.
# An hour of one CPU core. A result that is in RESULTS is not made again, so the same command continues.
#
#     benchmarks/line_text.sh
#     JANUS=folder RESULTS=output_dir/mine benchmarks/line_text.sh    # another Janus
#     IMAGES=4 KL_IMAGES=2 BUDGETS=1/2 RESULTS=output_dir/few benchmarks/line_text.sh    # a short test
#
# RESULTS is the folder of the results and prompts, PYTHON the interpreter, SEED eval.py's. Give each model and
# seed a RESULTS of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-output_dir/line_text}
JANUS=${JANUS:-pretrained_models/janus_tiny}
SEED=${SEED:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$RESULTS"
prompts=$RESULTS/captions.txt
[ -s "$prompts" ] || "$PYTHON" -m util.tiny.captions --num_images 100 >"$prompts"

locality() { # name, flags
    local file=$RESULTS/line_locality_$1
    [ -s "$file.json" ] || "$PYTHON" -m benchmarks.line_locality "${@:2}" --num_images "${KL_IMAGES:-20}" \
        --seed "$SEED" --device cpu --output "$file"
}
locality gpt_tiny --model gpt_tiny
locality "$(basename "$JANUS")" --model "$JANUS" --prompts "$prompts"

"$PYTHON" -m benchmarks.line_prompts --resume "$JANUS" --num_images "${IMAGES:-1000}" --kl_images "${KL_IMAGES:-20}" \
    --columns "${COLUMNS_SHOWN:-8}" --budgets "${BUDGETS:-1/2,1/4,1/6,1/8}" --seed "$SEED" --device cpu \
    --output "$RESULTS/line_prompts"
