"""Shared by the benchmarks: clocks, limits of the machine, checks of flags, result files."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from models.sampling_copy import sampling_linear
from util.config import SentenceParser
from util.device import DTYPES, pick_dtype
from util.errors import UserError
from util.evaluation.run_folder import provenance
from util.files import read_json, write_json, write_text

OUTPUT = Path("output_dir/benchmarks")  # where results go by default


def clock_of(device: torch.device) -> Callable[[], float]:
    """The wall clock, or with one CPU thread the CPU time of the process."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: CUDA events where there are some, else the clock of the device."""
    if device.type != "cuda":
        clock = clock_of(device)
        began = clock()
        call()
        return clock() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The fastest of ten calls by the clock of the device, after one that does not count."""
    call()
    return min(timed(call, device) for _ in range(10))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large linear layer: the ceiling of matrix products."""
    size = 8192 if device.type == "cuda" else 2048
    x, weight = torch.randn(2, size, size, device=device).to(dtype)
    layer = sampling_linear(weight, weight[0], dtype)
    return 2 * size**3 / best_seconds(lambda: layer(x), device)


def read_rate(device: torch.device) -> float:
    """Bytes/s of adding up a tensor of 1 GB (CUDA) or 256 MB: the ceiling of reading weights."""
    x = torch.ones((1 << 28) if device.type == "cuda" else (1 << 26), device=device)
    return x.nbytes / best_seconds(x.sum, device)


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    warmup: int,
    repeats: int,
    title: str = "",
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds of each call by turn, without the warm-ups, and on CUDA the peak GB of its last turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float | None] = dict.fromkeys(calls)
    for turn in range(-warmup, repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(call, device)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            if turn >= 0:
                times[name].append(seconds)
            print(f"{title}{name}: {seconds:.3f} s", flush=True)
    return times, peaks


def default_dtype(device: torch.device) -> str:
    """Name of the precision that a device computes in by default, as --dtype takes it."""
    dtype = pick_dtype(None, device)
    return next(name for name, value in DTYPES.items() if value == dtype)


class Parser(SentenceParser):
    """Flags of `python -m benchmarks.NAME`; --help shows the description line by line."""

    def __init__(self, name: str, description: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        program = f"python -m benchmarks.{name}"
        super().__init__(prog=program, description=description, formatter_class=layout)
        self._least: dict[str, int] = {}

    def number(
        self,
        name: str,
        default: float | None,
        help: str = "",
        least: int = 1,
        kind: type[int] | type[float] = int,
    ) -> None:
        """A flag for a number of `least` or more."""
        self.add_argument(f"--{name}", type=kind, default=default, help=help or None)
        self._least[name] = least

    def device(self) -> None:
        """The flags --device and --dtype."""
        self.add_argument("--device", help="cuda where there is one, else cpu")
        self.add_argument("--dtype", choices=tuple(DTYPES), help="bf16 on cuda, else float32")

    def checked(self) -> argparse.Namespace:
        """Parse sys.argv. UserError for a number below its least; None, the flag not given, passes."""
        args = self.parse_args()
        for name, least in self._least.items():
            value = getattr(args, name)
            if value is not None and value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        return args

    def read(self, output: Path | None = None) -> argparse.Namespace:
        """`checked`, with the flag --output, for `write_result`; `output` is its default."""
        files = "write FILE.json and FILE.md" + (f" (default: {output})" if output else "")
        self.add_argument("--output", type=Path, metavar="FILE", default=output, help=files)
        args = self.checked()
        prepare_output(args.output)
        return args


def batch_sizes(text: str) -> list[int]:
    """The numbers of images that --batches lists. UserError if one is not a number above 0."""
    if not all(word.isdecimal() and int(word) > 0 for word in text.split(",")):
        raise UserError(f"--batches {text} must be numbers of images, such as 1,8,64")
    return [int(word) for word in text.split(",")]


def listed(text: str, flag: str, known: Collection[str]) -> list[str]:
    """The names that a flag lists, such as mar_base,mar_huge. UserError for an unknown one."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--{flag} {name} is unknown; use some of {','.join(known)}")
    return names


def origin() -> dict[str, object]:
    """Command, commit and torch version of a result; the command without this machine's paths."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return {**provenance(), "command": shlex.join(["python", "-m", module, *sys.argv[1:]])}


def with_ending(path: Path, ending: str) -> Path:
    """PATH + ending, for a PATH or PATH.json; other dots in the name stay."""
    return path.with_name(path.name.removesuffix(".json") + ending)


def prepare_output(path: Path | None) -> None:
    """Make the folder of PATH.json before anything is measured. UserError if that is not possible."""
    if path is None:
        return
    if not path.name:
        raise UserError(f"--output {path} names no file: give one, such as output_dir/result")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): give another --output") from error


def stored_rows(path: Path, settings: Mapping[str, object]) -> list[dict[str, Any]]:
    """Rows of PATH.json by an earlier call with the same settings, [] if there are none."""
    path = with_ending(path, ".json")
    if not path.exists():
        return []
    remedy = "remove it, or give another --output"
    stored = read_json(path, dict, remedy)
    about, rows = stored.get("about"), stored.get("rows")
    if not isinstance(about, dict) or not isinstance(rows, list):
        raise UserError(f"{path} holds no rows of a benchmark: {remedy}")
    return rows if all(about.get(key) == value for key, value in settings.items()) else []


def write_result(path: Path | None, document: Mapping[str, Any], text: str) -> None:
    """Print the table and the document, one line of JSON; with a path write PATH.md and PATH.json."""
    about = "\n".join(f"    {key}: {value}" for key, value in document["about"].items())
    text = f"{text.rstrip()}\n\n{about}\n"  # the empty line makes them a separate block
    if path:
        prepare_output(path)
        write_text(with_ending(path, ".md"), text)
        write_json(with_ending(path, ".json"), document)
    print(text)
    print(json.dumps(document))
