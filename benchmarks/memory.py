"""Peak memory of sampling one batch, in a process of its own."""

import concurrent.futures
import multiprocessing
import re
from pathlib import Path

import torch

from benchmarks.mar_work import build
from models.lazy_mar import LazyMARConfig
from models.sampler import Sampler


def peak_gb(
    name: str,
    config: LazyMARConfig | None,
    num_iter: int,
    cfg: float,
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> float:
    """GB at most, of a fresh process that builds a model of random weights and samples.

    On CUDA the device's own count. On CPUs (Linux) the whole process, whose head takes 4 steps to
    save time.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, name, config, num_iter, cfg, batch, dtype, device).result()


def _peak(
    name: str,
    config: LazyMARConfig | None,
    num_iter: int,
    cfg: float,
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> float:
    torch.set_num_threads(1)
    on_cuda = torch.device(device).type == "cuda"
    model = build(name, device, **({} if on_cuda else {"num_sampling_steps": "4"}))
    labels = [i % model.class_num for i in range(batch)]
    noise = model.image_noise(range(batch))
    Sampler(model, dtype).sample_tokens(
        batch, num_iter, cfg, labels=labels, lazy_mar=config, noise=noise
    )
    if on_cuda:
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak too
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
