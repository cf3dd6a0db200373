"""Generates batches of images while other threads prepare the next batch and save the last one.

While the device computes a batch, a thread prepares the next (numpy draws the noise on the CPU) and
others write the PNGs of the last. On CUDA only the main thread launches kernels, asynchronously: a call
from another thread could disturb the recording of a CUDA graph. A model is an ImageGenerator here.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from util.device import to_host
from util.evaluation.batches import Job, Task
from util.images import PngWriter, find_broken, refuse_broken, to_bytes


class ImageGenerator(Protocol):
    """A model that makes images."""

    def prepare(self, conditions: Sequence[Any], seeds: Sequence[int], /) -> Any:
        """CPU work for one batch, in a thread while the last batch is computed.

        conditions: class labels (int) or prompts (str), whichever the model takes.
        """

    def generate(self, prepared: Any, /) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] on the device, which may still be computing them.

        The pixels of a row must not depend on what is in the other rows.
        """


class Sink(AbstractContextManager, Protocol):
    """Receives the images. Leaving the block waits for the last one, and raises errors."""

    def take(self, job: Job, first: int, images: Tensor) -> None:
        """Images (B, 3, H, W) in [-1, 1]; row r is image first + r, if it is one of job.wanted."""


@dataclass(frozen=True)
class Production:
    """Result of one process: images saved or scored, images computed (also those not wanted), seconds
    of computation, and of everything until the last image was saved."""

    images: int = 0
    computed: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0


class Stopwatch:
    """Adds up the time a device spends in `with` blocks; on CUDA by events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[Any, Any]] | None = [] if device.type == "cuda" else None
        self._seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is None:
            self._seconds += self._now() - self._began
        else:
            self._events.append((self._began, self._now()))

    def _now(self) -> Any:
        if self._events is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Sum of all spans; waits for the last."""
        for start, end in self._events or ():
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        if self._events:
            self._events.clear()
        return self._seconds


@torch.no_grad()
def produce(
    generator: ImageGenerator,
    task: Task,
    jobs: Sequence[Job],
    sink: Sink,
    device: torch.device,
    after_batch: Callable[[int], None] = lambda images: None,
) -> Production:
    """Make the wanted images of all jobs; `after_batch` gets the number of images of each."""
    grid, watch, began = task.grid, Stopwatch(device), time.perf_counter()

    def prepare(job: Job) -> Any:
        return generator.prepare(task.conditions(grid.padded(job.batch)), task.seeds(job.batch))

    with ThreadPoolExecutor(1) as thread, sink:
        ahead = [thread.submit(prepare, job) for job in jobs[:1]]
        for number, job in enumerate(jobs):
            prepared = ahead.pop().result()
            ahead += [thread.submit(prepare, following) for following in jobs[number + 1 :][:1]]
            with watch:
                images = generator.generate(prepared)
            sink.take(job, grid.padded(job.batch).start, images)
            after_batch(len(job.wanted))
    return Production(
        images=sum(len(job.wanted) for job in jobs),
        computed=sum(len(grid.images(job.batch)) for job in jobs),
        seconds=watch.seconds(),
        wall_seconds=time.perf_counter() - began,
    )


class PngSink:
    """Writes the wanted images as PNGs, in threads."""

    def __init__(self, path_of: Callable[[int], Path], rows: int) -> None:
        """rows: size of a batch. Up to two batches, or 256 images, wait in memory."""
        self._path_of = path_of
        self._writer = PngWriter(capacity=max(256, 2 * rows))
        self._under_way: deque[Callable[[], None]] = deque()

    def __enter__(self) -> "PngSink":
        self._writer.__enter__()
        return self

    def take(self, job: Job, first: int, images: Tensor) -> None:
        """See Sink. On CUDA the previous batch is written while the device computes this one."""
        fetched = to_host([to_bytes(images), find_broken(images)])
        self._under_way.append(lambda: self._write(job.wanted, first, *fetched()))
        while len(self._under_way) > (images.device.type == "cuda"):
            self._under_way.popleft()()

    def _write(self, wanted: Sequence[int], first: int, pixels: Tensor, broken: Tensor) -> None:
        refuse_broken(broken)
        array = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, 3)
        for index in wanted:
            self._writer.write(self._path_of(index), array[index - first])

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            while error is None and self._under_way:
                self._under_way.popleft()()
        except BaseException as failure:
            self._writer.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._writer.__exit__(kind, error, traceback)


class FeatureSink:
    """Scores the wanted images as they come and keeps none (--no_save)."""

    def __init__(self, update: Callable[[Sequence[int], Tensor], None]) -> None:
        """`update` takes indices and their images (B, 3, H, W) uint8; jobs want their first rows."""
        self._update = update
        self._broken: Tensor | None = None  # of the last batch, read when the next is launched

    def __enter__(self) -> "FeatureSink":
        return self

    def take(self, job: Job, first: int, images: Tensor) -> None:
        if self._broken is not None:
            refuse_broken(self._broken)
        self._broken = find_broken(images)
        self._update(job.wanted, to_bytes(images)[: len(job.wanted)])

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is None and self._broken is not None:
            refuse_broken(self._broken)
