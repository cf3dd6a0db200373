"""Device and precision of a run: stated or chosen once, at the start, and then passed on."""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from util.config import setting
from util.errors import UserError

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    """Where to compute, and in which precision."""

    device: str | None = setting(None, "cpu, cuda, cuda:1 or mps; default cuda if there is one")
    dtype: str | None = setting(None, "default: bf16 on cuda, else float32", choices=tuple(DTYPES))
    threads: int | None = setting(None, "CPU threads per process; default 1", least=1)


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The named device; without a name CUDA if there is one, else the CPU.

    A name that this machine lacks is a UserError. Plain "cuda" becomes the GPU of `local_rank`.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; use cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} cannot be used; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch sees no MPS device here; use --device cpu")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"CUDA device {index} asked for, {torch.cuda.device_count()} present")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """The hardware's own name, such as "NVIDIA H200" or "Intel(R) Xeon(R) Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def set_threads(stated: int | None) -> None:
    """CPU threads of this process: the stated number, else 1.

    The number decides in which order products are summed, so with a default that depends on the machine
    the last bits of an image would too. Several processes use more cores as well, and small products are
    slower in two threads than in one.
    """
    torch.set_num_threads(stated or 1)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; without a name bfloat16 on CUDA and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def slow_bf16(device: torch.device, dtype: str | None) -> str | None:
    """A sentence if bf16 was asked for on a CPU that multiplies float32 matrices faster; takes 50 ms.

    That is so for processors with AVX512-BF16 but without AMX.
    """
    if device.type != "cpu" or dtype != "bf16":
        return None
    rates = {name: _matrix_rate(DTYPES[name]) for name in ("float32", "bf16")}
    if rates["bf16"] >= rates["float32"]:
        return None
    return (
        f"this CPU multiplies bf16 matrices at {rates['bf16'] / 1e9:.0f} GFLOP/s and float32 ones at "
        f"{rates['float32'] / 1e9:.0f}: --dtype float32 is faster here"
    )


def _matrix_rate(dtype: torch.dtype, rows: int = 128, width: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of (rows, width) @ (width, width) on the CPU: the fastest of some after the first."""
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    return 2 * rows * width**2 / min(seconds[1:])


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a copy to CUDA is asynchronous, through pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Start copying tensors of one device to the CPU; returns a function that waits for the copies."""
    if tensors[0].device.type != "cuda":
        copies = [tensor.cpu() for tensor in tensors]
        return lambda: copies
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[torch.Tensor]:
        done.synchronize()
        return copies

    return wait


def can_compile(device: torch.device, show: bool) -> bool:
    """Whether to use torch.compile on this device; `show` announces it on stderr.

    On CPUs it gained at most 20% and cost a minute (docs/benchmarks.md). Compiled code is kept in
    ~/.cache/torchinductor unless TORCHINDUCTOR_CACHE_DIR names another folder.
    """
    if device.type != "cuda":
        return False
    cache = os.path.join(os.path.expanduser("~"), ".cache", "torchinductor")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    try:
        torch.compile(torch.add)(*torch.ones(2, 8, device=device))
    except Exception as error:  # whatever a missing compiler, driver or Triton raises
        reason = str(error).strip().splitlines()[0]
        print(f"torch.compile does not work here ({reason}); running without it", file=sys.stderr)
        return False
    if show:
        print("compiling during the first batch (--no_compile skips this) ...", file=sys.stderr)
    return True


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; float32 is no autocast at all."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
