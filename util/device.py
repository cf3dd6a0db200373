"""Device and precision of a run: stated or chosen once, at the start, and then passed on."""

import platform
from contextlib import AbstractContextManager, nullcontext

import torch

from util.errors import UserError

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The named device; without a name CUDA if there is one, else the CPU.

    A name that this machine lacks is a UserError. Plain "cuda" becomes the GPU of `local_rank`.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"--device {name} is not a device name; use cpu, cuda, cuda:1 or mps"
        ) from error
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
    """The hardware's own name, such as "NVIDIA H200" or "x86_64"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine()


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; without a name bfloat16 on CUDA and float32 elsewhere."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; float32 is no autocast at all."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
