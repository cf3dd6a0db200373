"""Speed and memory of the key-value cache at the real sizes, with random weights.

    python -m benchmarks.line_latency --model gpt_xl --batches 1,16,64,128,256     # on a GPU: bf16
    python -m benchmarks.line_latency --model gpt_b --batches 16 --device cpu --dtype bf16
    python -m benchmarks.line_latency --model gpt_xl --batches 256 --sizes_only    # bytes, anywhere

Per batch and budget: images per second of sample_tokens with guidance; bytes of the cache and of LineAR's
workspace, against theory; peak memory on CUDA; and the bytes per second that a step reads at least
(weights, live keys and values), to be compared with the device's read rate below the table. --max_batch
finds the largest batch that fits. Budgets take turns. With one CPU thread, CPU seconds are counted. The
last line is one JSON document.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from benchmarks.common import (
    add_output,
    at_least,
    batch_sizes,
    clock_of,
    origin,
    prepare_output,
    read_rate,
    timed,
    write_result,
)
from engine.llamagen import PRESETS as LLAMAGEN
from models import llamagen
from models.gpt_sampler import GPTSampler
from models.line_cache import LineARConfig, LinePlan, make_cache
from models.line_methods import METHODS
from models.llamagen import GPT
from util.device import DTYPES, can_compile, device_name, pick_device, pick_dtype, set_threads
from util.errors import UserError, run_main
from util.report import markdown_table

HEAD = ["batch", "budget", "slots", "images_per_s", "speedup", "cache_gb", "cache_over_theory"]
HEAD += ["workspace_gb", "peak_gb", "read_gb_per_s"]


def cache_bytes(model: GPT, config: LineARConfig, rows: int) -> tuple[int, int]:
    """Bytes of keys and values, and of the workspace, as one decoded position allocates them."""
    cache = make_cache(config, model.grid, len(model.layers))
    x = model.cls_embedding(torch.zeros(rows, dtype=torch.long, device=model.device))
    with torch.no_grad():
        model.decode(x, model.rope()[:1], cache)
    return cache.nbytes, cache.workspace_nbytes


def theory_bytes(model: GPT, plan: LinePlan, rows: int) -> int:
    """Condition + budget + one line, keys and values of all layers."""
    width = model.n_head * model.head_dim * model.output.weight.itemsize
    return rows * plan.slots * 2 * width * len(model.layers)


def read_bytes(model: GPT, plan: LinePlan, rows: int) -> int:
    """Weights once per step, and every live key and value, over all steps of an image."""
    weights = sum(p.nbytes for p in model.layers.parameters()) + model.output.weight.nbytes
    live = sum(
        plan.condition + min(i, plan.budget + 1 + (i - 1) % plan.line)
        for i in range(model.block_size)
    )
    return model.block_size * weights + live * theory_bytes(model, plan, rows) // plan.slots


def sampling_seconds(sampler: GPTSampler, config: LineARConfig, batch: int, cfg: float) -> float:
    """One call of sample_tokens."""
    labels = torch.arange(batch) % sampler.model.num_classes
    sample = partial(sampler.sample_tokens, labels, cfg, seeds=range(batch), line_ar=config)
    return timed(sample, sampler.model.device)


def largest_batch(model: GPT, config: LineARConfig, cfg: float, first: int = 1) -> int:
    """The largest power of two, or 1.5 times one, that can be sampled without running out of memory.

    first: a power of two to begin with; 0 is found where that is too large.
    """
    best, batch = 0, first
    while True:
        try:
            torch.cuda.empty_cache()
            sampling_seconds(GPTSampler(model), config, batch, cfg)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return best
        best = batch
        batch = batch * 3 // 2 if batch & (batch - 1) == 0 and batch > 1 else (batch * 4 + 2) // 3


def sizes(model: GPT, plan: LinePlan, config: LineARConfig, rows: int) -> dict[str, Any]:
    """Columns of a table that follow from shapes; on the meta device, too."""
    held, workspace = cache_bytes(model, config, rows)
    return {
        "slots": plan.slots,
        "cache_gb": held / 1e9,
        "cache_over_theory": held / theory_bytes(model, plan, rows),
        "workspace_gb": workspace / 1e9,
    }


def measure(
    model: GPT,
    configs: Mapping[str, LineARConfig],
    batch: int,
    cfg: float,
    repeats: int,
    fast: bool = False,
) -> dict[str, dict[str, Any]]:
    """Budget -> its columns that take time, or a device that counts its memory.

    fast: torch.compile and CUDA graphs. On CUDA one budget follows the other, because each holds its
    cache and graphs; then the first call, which compiles and records, is one more.
    """
    found: dict[str, dict[str, Any]] = {b: {"seconds": math.inf, "peak_gb": None} for b in configs}
    on_cuda = model.device.type == "cuda"
    turns = [b for _ in range(repeats) for b in configs]
    if on_cuda:
        turns = [b for b in configs for _ in range(1 + repeats)]
    sampler, last = GPTSampler(model), ""
    for b in turns:
        if fast and b != last:
            del sampler  # free its memory first
            sampler, last = GPTSampler(model, compile=True, graphs=True), b
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = sampling_seconds(sampler, configs[b], batch, cfg)
        found[b]["seconds"] = min(found[b]["seconds"], seconds)
        if on_cuda:
            found[b]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    base = next(iter(found.values()))["seconds"]
    for row in found.values():
        row |= {"images_per_s": batch / row["seconds"], "speedup": base / row["seconds"]}
    return found


def parse() -> argparse.Namespace:
    """The command line; batches and configs (budget -> LineARConfig) are read from their texts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.line_latency", description=__doc__)
    parser.add_argument(
        "--model", default="gpt_xl", help="gpt_b, gpt_l, gpt_xl, gpt_xxl, gpt_3b or gpt_tiny"
    )
    parser.add_argument("--lines", type=int, default=24, help="of a square grid: 24 is 384 pixels")
    parser.add_argument("--batches", default="1,16,64", help="images per batch")
    parser.add_argument(
        "--budgets", default="1,1/4,1/6", help="the first is what others compare with"
    )
    parser.add_argument("--method", default="linear", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--cfg", type=float, default=1.75)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument(
        "--max_batch",
        action="store_true",
        help="look for the largest from the last of --batches on (CUDA)",
    )
    parser.add_argument(
        "--sizes_only", action="store_true", help="bytes alone, from shapes: nothing is sampled"
    )
    parser.add_argument("--no_compile", action="store_true", help="as eval.py's")
    parser.add_argument("--threads", type=int, help="CPU threads (1)")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    add_output(parser)
    args = parser.parse_args()
    if args.max_batch and args.sizes_only:
        raise UserError("--max_batch samples, which --sizes_only does not: remove one of them")
    if args.model not in LLAMAGEN:
        raise UserError(f"--model {args.model} is not a GPT model: use gpt_b to gpt_3b or gpt_tiny")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method} is unknown; use one of {', '.join(METHODS)}")
    args.batches = batch_sizes(args.batches)
    at_least(args, 1, "lines", "repeats", "threads")
    try:
        args.configs = {
            b: LineARConfig(budget=float(Fraction(b)), method=args.method)
            for b in args.budgets.split(",")
        }
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--budgets {args.budgets}: {error}") from error
    prepare_output(args.output)
    return args


def main() -> None:
    args = parse()
    set_threads(args.threads)
    device = torch.device("meta") if args.sizes_only else pick_device(args.device)
    dtype = DTYPES[args.dtype or "bf16"] if args.sizes_only else pick_dtype(args.dtype, device)
    if args.max_batch and device.type != "cuda":
        raise UserError(f"--max_batch needs a device that says when it is full, not {device}")
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(llamagen, args.model)(block_size=args.lines**2).to(dtype).eval()
    try:
        plans = {b: config.plan(model.grid) for b, config in args.configs.items()}
    except ValueError as error:
        raise UserError(f"--budgets {args.budgets}: {error}") from error
    fast = not (args.no_compile or args.sizes_only) and can_compile(device, show=True)
    rows = []
    for batch in args.batches:
        count = batch * (2 if args.cfg > 1 else 1)
        measured = {}
        if not args.sizes_only:
            measured = measure(model, args.configs, batch, args.cfg, args.repeats, fast)
        for b, config in args.configs.items():
            row = {"batch": batch, "budget": b, **sizes(model, plans[b], config, count)}
            if b in measured:
                read = read_bytes(model, plans[b], count) / measured[b]["seconds"]
                row |= measured[b] | {"read_gb_per_s": read / 1e9}
            rows.append(row)
            print(json.dumps(row), flush=True)
    largest = {}
    if args.max_batch:
        largest = {
            b: largest_batch(model, c, args.cfg, 1 << (max(args.batches).bit_length() - 1))
            for b, c in args.configs.items()
        }
    about = {
        **origin(),
        "model": args.model,
        "grid": list(model.grid),
        "cfg": args.cfg,
        "method": args.method,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if not args.sizes_only:
        about |= {
            "repeats": args.repeats,
            "compile and CUDA graphs": fast,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "clock": "wall"
            if clock_of(device) is time.perf_counter
            else "seconds of the one thread",
            "device_read_gb_per_s": read_rate(device) / 1e9,
            "seeds": "0 .. batch - 1; weights: torch.manual_seed(0)",
        }
    document = {"about": about, "rows": rows, "largest_batch": largest}
    head = [key for key in HEAD if key in rows[0]]
    table = markdown_table(head, [[row[key] for key in head] for row in rows])
    if largest:
        found = ", ".join(f"{n} at budget {b}" for b, n in largest.items())
        table += f"\nLargest batch: {found}.\n"
    write_result(args.output, document, table)


if __name__ == "__main__":
    run_main(main)
