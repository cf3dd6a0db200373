"""Peak memory of a function, in its own process."""

import concurrent.futures
import multiprocessing
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.mar_work import build
from models.fast_mar import FastMARConfig
from models.sampler import Sampler


def peak_of(device: str, work: Callable[..., None], *args: object) -> float:
    """GB at most of a fresh process that calls work(*args), a function of a module.

    On CUDA the device's own count; on CPUs (Linux) the whole process.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, device, work, args).result()


def _peak(device: str, work: Callable[..., None], args: tuple) -> float:
    work(*args)
    peak = PeakMemory(torch.device(device)).read()
    assert peak is not None  # Linux
    return peak


class PeakMemory:
    """The most memory since `reset`, GB: the device's count, on a CPU the process's (Linux, else None)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def read(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        try:
            # getrusage would count the parent's peak too
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return None if found is None else int(found[1]) * 1024 / 1e9


@dataclass(frozen=True)
class SampledBatch:
    """A batch sampled from a model of random weights; on CPUs the head takes 4 steps.

    geometry: (name, value) pairs of the model's arguments that are not its preset's.
    """

    name: str
    task: FastMARConfig
    cfg: float
    size: int
    dtype: torch.dtype
    device: str
    geometry: tuple[tuple[str, object], ...] = ()

    def sample(self) -> None:
        """Sample it on one thread."""
        torch.set_num_threads(1)
        few, task = {}, self.task
        if torch.device(self.device).type != "cuda":
            few["num_sampling_steps"] = "4"
            task = replace(task, head=replace(task.head, steps=None))
        model = build(self.name, self.device, **{**dict(self.geometry), **few})
        Sampler(model, self.dtype).sample_tokens(
            self.size,
            cfg=self.cfg,
            labels=[i % model.class_num for i in range(self.size)],
            noise=model.image_noise(range(self.size)),
            **task.arguments(),
        )


def peak_gb(batch: SampledBatch) -> float:
    """peak_of sampling the batch."""
    return peak_of(batch.device, batch.sample)
