"""Speed and memory of the key-value cache at the real sizes, with random weights.

    python -m benchmarks.line_latency --model gpt_xl --batches 1,16,64,128,256     # on a GPU: bf16
    python -m benchmarks.line_latency --model gpt_b --batches 16 --device cpu --dtype bf16
    python -m benchmarks.line_latency --model gpt_xl --batches 256 --sizes_only    # bytes, anywhere
    python -m benchmarks.line_latency --model janus_pro_1b --batches 1,16,64,128   # needs transformers

Per batch and budget: images per second of sample_tokens with guidance; bytes of the cache and of LineAR's
workspace, against theory; peak memory of the device, or of the process on a CPU; and the bytes per second
that a step reads at least (weights, live keys and values), to be compared with the device's read rate below
the table. A Janus is compared with transformers' own full caches, "dynamic" and "static". --max_batch
finds the largest batch that fits. Budgets take turns. With one CPU thread, CPU seconds are counted. The
last line is one JSON document.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import Parser, batch_sizes, clock_of, origin, read_rate, write_result
from benchmarks.line_work import LIBRARY, GPTWork, JanusWork, Variant, Work
from benchmarks.memory import PeakMemory
from engine.llamagen import PRESETS
from models import llamagen
from models.line_cache import LineARConfig
from models.line_methods import METHODS
from util.device import DTYPES, can_compile, device_name, pick_device, pick_dtype, set_threads
from util.errors import UserError, run_main
from util.report import markdown_table

GPTS = tuple(name for name in PRESETS if hasattr(llamagen, name))
JANUS = ("janus_pro_1b", "janus_pro_7b")
HEAD = ["batch", "budget", "slots", "images_per_s", "speedup", "cache_gb", "cache_over_theory"]
HEAD += ["workspace_gb", "peak_gb", "read_gb_per_s"]


def largest_batch(work: Work, variant: Variant, cfg: float, first: int = 1) -> int:
    """The largest power of two, or 1.5 times one, that can be sampled without running out of memory.

    first: a power of two to begin with; 0 is found where that is too large.
    """
    best, batch = 0, first
    while True:
        try:
            torch.cuda.empty_cache()
            work.renew(fast=False)
            work.seconds(variant, batch, cfg)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return best
        best = batch
        batch = batch * 3 // 2 if batch & (batch - 1) == 0 and batch > 1 else (batch * 4 + 2) // 3


def measure(
    work: Work,
    variants: Mapping[str, Variant],
    batch: int,
    cfg: float,
    repeats: int,
    fast: bool = False,
) -> dict[str, dict[str, Any]]:
    """Budget -> its columns that take time, or count memory.

    fast: torch.compile and CUDA graphs. On CUDA one budget follows the other, because each holds its
    cache and graphs; then the first call, which compiles and records, is one more.
    """
    found: dict[str, dict[str, Any]] = {b: {"seconds": math.inf, "peak_gb": None} for b in variants}
    turns = [b for _ in range(repeats) for b in variants]
    if work.device.type == "cuda":
        turns = [b for b in variants for _ in range(1 + repeats)]
    memory, last = PeakMemory(work.device), ""
    for b in tqdm(turns, desc=f"batch {batch}", unit="turn", disable=None):
        if fast and b != last:
            work.renew(fast)
            last = b
        memory.reset()
        seconds = work.seconds(variants[b], batch, cfg)
        found[b] = {"seconds": min(found[b]["seconds"], seconds), "peak_gb": memory.read()}
    base = next(iter(found.values()))["seconds"]
    for row in found.values():
        row |= {"images_per_s": batch / row["seconds"], "speedup": base / row["seconds"]}
    return found


def parse() -> argparse.Namespace:
    """The command line; batches and variants (budget -> its cache) are read from their texts."""
    parser = Parser("line_latency", __doc__)
    parser.add_argument("--model", default="gpt_xl", choices=(*GPTS, *JANUS))
    parser.number("lines", 24, "of a square grid: 24 is 384 pixels")
    parser.add_argument("--batches", default="1,16,64", help="images per batch")
    parser.add_argument(
        "--budgets",
        help="1,1/4,1/6, of a Janus after dynamic,static, the full caches of transformers; the first is "
        "what others compare with",
    )
    parser.add_argument("--method", default="linear", choices=tuple(METHODS))
    parser.add_argument("--cfg", type=float, help="guidance: 1.75, of a Janus 5")
    parser.number("repeats", 3, "the fastest counts")
    parser.add_argument(
        "--max_batch",
        action="store_true",
        help="look for the largest from the last of --batches on (CUDA)",
    )
    parser.add_argument(
        "--sizes_only", action="store_true", help="bytes alone, from shapes: nothing is sampled"
    )
    parser.add_argument("--no_compile", action="store_true", help="as eval.py's")
    parser.number("threads", None, "CPU threads (1)")
    parser.device()
    args = parser.read()
    if args.max_batch and args.sizes_only:
        raise UserError("--max_batch samples, which --sizes_only does not: remove one of them")
    library = LIBRARY if args.model in JANUS else ()
    args.budgets = args.budgets or ",".join([*library, "1,1/4,1/6"])
    args.batches = batch_sizes(args.batches)
    try:
        args.variants = {
            b: b if b in library else LineARConfig(budget=float(Fraction(b)), method=args.method)
            for b in args.budgets.split(",")
        }
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--budgets {args.budgets}: {error}") from error
    return args


def main() -> None:
    args = parse()
    set_threads(args.threads)
    device = torch.device("meta") if args.sizes_only else pick_device(args.device)
    dtype = DTYPES[args.dtype or "bf16"] if args.sizes_only else pick_dtype(args.dtype, device)
    if args.max_batch and device.type != "cuda":
        raise UserError(f"--max_batch needs a device that says when it is full, not {device}")
    torch.manual_seed(0)
    janus = args.model in JANUS
    try:
        work: Work = (JanusWork if janus else GPTWork)(args.model, args.lines, device, dtype)
        for variant in args.variants.values():
            work.plan(variant)
    except ValueError as error:
        raise UserError(f"--budgets {args.budgets}: {error}") from error
    except ImportError as error:
        raise UserError(f"--model {args.model} needs `pip install '.[transformers]'`") from error
    cfg = work.cfg if args.cfg is None else args.cfg
    fast = not (args.no_compile or args.sizes_only or janus) and can_compile(device, show=True)
    rows = []
    for batch in args.batches:
        count = batch * (2 if cfg > 1 else 1)
        measured = {}
        if not args.sizes_only:
            measured = measure(work, args.variants, batch, cfg, args.repeats, fast)
        for b, variant in args.variants.items():
            row = {"batch": batch, "budget": b, **work.sizes(variant, count)}
            if b in measured:
                read = work.read_bytes(variant, count) / measured[b]["seconds"]
                row |= measured[b] | {"read_gb_per_s": read / 1e9}
            rows.append(row)
            print(json.dumps(row), flush=True)
    largest = {}
    if args.max_batch:
        largest = {
            b: largest_batch(work, v, cfg, 1 << (max(args.batches).bit_length() - 1))
            for b, v in args.variants.items()
        }
    about = {
        **origin(),
        "model": args.model,
        "grid": list(work.grid),
        "condition": work.condition,
        "cfg": cfg,
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
