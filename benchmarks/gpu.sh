#!/usr/bin/env bash
# Runs all GPU measurements that the documents announce. One H100-class card takes half an hour, a stage less
# than 8. A stage whose result file exists is skipped, so the same command continues.
#
#     benchmarks/gpu.sh                      all stages
#     benchmarks/gpu.sh line training        these alone
#     DEVICE=cpu benchmarks/gpu.sh           the same commands on tiny models: tests the script, measures nothing
#
# RESULTS is the folder of the result files, PYTHON the interpreter, LIMIT the seconds of a stage.
set -uo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python}
LIMIT=${LIMIT:-470}
STAGES="latency_base latency_large latency_huge waterfall_1 waterfall_64 line line_largest line_janus training"

if [ "$DEVICE" = cpu ]; then
    RESULTS=${RESULTS:-output_dir/gpu_script_on_cpu}
    few="--num_iter 2 --warmup 0 --repeats 1"
    latency_base="latency --models mar_tiny --batches 1,2 --modes plain,lazy,token,condition,head,balanced,fast $few"
    latency_large="latency --models mar_tiny --batches 1 $few"
    latency_huge="latency --models mar_tiny --batches 1 $few"
    waterfall_1="waterfall --model mar_tiny --batch 1 $few"
    waterfall_64="waterfall --model mar_tiny --batch 2 $few"
    line="line_latency --model gpt_tiny --lines 8 --batches 1,2 --budgets 1,1/2 --repeats 1"
    line_largest="line_latency --model gpt_tiny --lines 8 --batches 2 --repeats 1 --budgets 1,1/2"
    line_janus="line_latency --model janus_pro_1b --batches 1 --sizes_only"
    training="training --model mar_tiny --batch 2 --warmup 0 --repeats 1 --rows eager,ours,checkpointing"
else
    RESULTS=${RESULTS:-benchmarks/results}
    latency_base="latency --models mar_base --batches 1,8,64,128 --modes plain,lazy,token,condition,head,balanced,fast --warmup 2"
    latency_large="latency --models mar_large --batches 1,64 --warmup 2"
    latency_huge="latency --models mar_huge --batches 1,64,128 --warmup 2 --repeats 2"
    waterfall_1="waterfall --model mar_huge --batch 1 --warmup 2"
    waterfall_64="waterfall --model mar_huge --batch 64 --warmup 2 --repeats 1"
    line="line_latency --model gpt_xl --batches 1,16,64,256 --repeats 2"
    line_largest="line_latency --model gpt_xl --batches 256 --repeats 1 --no_compile --max_batch"
    line_janus="line_latency --model janus_pro_1b --batches 1,64,128 --budgets dynamic,static,1/6 --repeats 1"
    training="training --model mar_large --batch 64"
fi

failed=0
report=""
for stage in ${*:-$STAGES}; do
    case " $STAGES " in
        *" $stage "*) ;;
        *) echo "error: $stage is no stage; use some of: $STAGES" >&2; exit 2 ;;
    esac
    file=$RESULTS/gpu_$stage
    began=$SECONDS
    if [ -s "$file.json" ]; then
        outcome="there already"
    elif read -ra command <<<"${!stage}" &&
        timeout "$LIMIT" "$PYTHON" -m "benchmarks.${command[0]}" "${command[@]:1}" --device "$DEVICE" --output "$file"; then
        outcome="done"
    else
        outcome="failed or over $LIMIT s"
        failed=1
    fi
    report+=$(printf '%-14s  %4d s  %s' "$stage" $((SECONDS - began)) "$outcome")$'\n'
done
printf '\nstage            time  outcome, in %s\n%s' "$RESULTS" "$report"
exit $failed
