"""Training data: images in class folders, or their cached latents.

All randomness of the data (order and flips) is drawn before an epoch from (seed, epoch), so that a
run can continue in the middle of an epoch with the same batches, whatever the number of workers.
"""

import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from multiprocessing import active_children, get_context, get_start_method
from multiprocessing.connection import wait
from multiprocessing.context import DefaultContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from util.data.class_folders import ClassFolders
from util.data.latents import MOMENTS, read_moments
from util.errors import UserError
from util.images import IMAGE_SUFFIXES, open_rgb
from util.training.signals import STOP_SIGNALS

Pick = tuple[int, bool]  # index of an item, and whether to flip it
Item = TypeVar("Item")
_RAISED = "util.errors.UserError: "  # how a traceback begins its last line


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Square centre of an image as in ADM: box halvings, then bicubic to the size, then the crop.

    Returns (3, size, size) uint8.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 => float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


class ImageFolder(Dataset):
    """Images ROOT/CLASS/*; item ((index, flip)) is (uint8 (3, size, size), label)."""

    def __init__(self, root: str | Path, size: int) -> None:
        self.files, self.size = ClassFolders.scan(root, IMAGE_SUFFIXES), size

    def __len__(self) -> int:
        return len(self.files.samples)

    def relative_path(self, index: int) -> str:
        """Path of an image below ROOT, such as n01440764/n01440764_18.JPEG."""
        return str(Path(self.files.samples[index][0]).relative_to(self.files.root))

    def __getitem__(self, pick: Pick) -> tuple[Tensor, int]:
        index, flip = pick
        path, label = self.files.samples[index]
        image = center_crop(open_rgb(path), self.size)
        return (image.flip(-1) if flip else image), label


class CachedFolder(Dataset):
    """Latents of main_cache.py, ROOT/CLASS/*.npz; item ((index, flip)) is (moments, label)."""

    def __init__(self, root: str | Path, shape: tuple[int, ...] | None = None) -> None:
        """`shape` is that of the moments which the model needs, (2C, h, w)."""
        self.files, self.shape = ClassFolders.scan(root, (".npz",)), shape

    def __len__(self) -> int:
        return len(self.files.samples)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, int]:
        index, flip = pick
        path, label = self.files.samples[index]
        (moments,) = read_moments(path, [MOMENTS[flip]], self.shape)
        return moments, label

    def memory_bytes(self) -> int:
        """Bytes of the whole set in memory, both mirrorings."""
        return 2 * self[(0, False)][0].nbytes * len(self)


class CachedTensors:
    """A CachedFolder in one tensor (N, 2, 2C, h, w): batches are indexed, nothing is read."""

    def __init__(self, folder: CachedFolder) -> None:
        self.files = folder.files
        shape = folder.shape or tuple(folder[(0, False)][0].shape)
        self.moments = torch.empty(len(folder), 2, *shape)
        for i, (path, _) in enumerate(self.files.samples):
            self.moments[i, 0], self.moments[i, 1] = read_moments(path, shape=shape)
        self.labels = torch.tensor([label for _, label in self.files.samples])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, picks: Sequence[Pick]) -> tuple[Tensor, Tensor]:
        """Moments (B, 2C, h, w) and labels (B,) of the picks."""
        index = torch.tensor([i for i, _ in picks])
        flip = torch.tensor([int(f) for _, f in picks])
        return self.moments[index, flip], self.labels[index]


@dataclass(frozen=True)
class BatchPlan:
    """Which items, flipped or not, one process sees at every step of an epoch.

    The epoch's order is cut into steps of batch_size * accum_iter * world_size items, of which each
    rank takes its part, in accum_iter batches; the incomplete rest is dropped.
    """

    item_count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1

    def __post_init__(self) -> None:
        if self.steps == 0:
            raise UserError(
                f"{self.item_count} images are too few for one step of {self.images_per_step}"
            )

    @property
    def images_per_step(self) -> int:
        """Images of one step in all processes."""
        return self.batch_size * self.accum_iter * self.world_size

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.item_count // self.images_per_step

    def epoch(self, epoch: int, first_step: int = 0) -> list[list[Pick]]:
        """Picks of this process, batch by batch, from `first_step` to the end of the epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(self.item_count)
        flips = random.random(self.item_count) < 0.5
        picks = []
        for step, i in product(range(first_step, self.steps), range(self.accum_iter)):
            place = self.rank * self.accum_iter + i
            start = step * self.images_per_step + place * self.batch_size
            part = order[start : start + self.batch_size]
            picks.append(list(zip(part.tolist(), flips[part].tolist(), strict=True)))
        return picks


def batches(
    data: ImageFolder | CachedFolder | CachedTensors,
    picks: list[list[Pick]],
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches (images or moments, labels) in the order of `picks`."""
    if isinstance(data, CachedTensors):
        return _indexed(data.batch, picks)
    loader = DataLoader(
        data,
        batch_sampler=picks,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        multiprocessing_context=_Context(get_context(get_start_method())) if num_workers else None,
    )
    read = in_one_sentence(loader)
    if pin_memory:  # here, because torch's thread for it prints a traceback where a worker dies
        return ((items.pin_memory(), labels.pin_memory()) for items, labels in read)
    return read


class _Flag(Event):
    """An event without a lock: a worker killed inside the usual one's would keep it for ever."""

    def __init__(self, context: DefaultContext) -> None:
        self._value = context.RawValue("b", 0)

    def is_set(self) -> bool:
        return bool(self._value.value)

    def set(self) -> None:
        self._value.value = 1


class _Context(DefaultContext):
    """The usual context; its events, by which the loader ends its workers, are flags."""

    def Event(self) -> _Flag:
        return _Flag(self)


def _leave_signals_to_the_run(worker: int) -> None:
    """Schedulers and Ctrl-C signal all processes; the run still needs its workers to end its step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def in_one_sentence(loader: Iterable[Item]) -> Iterator[Item]:
    """The loader's batches; a UserError of a worker process without the traceback torch adds.

    The death of a worker is raised here. torch would raise it from a signal handler, wherever the run
    is, even between the weights and their averages.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    others = set(active_children())
    source = iter(loader)
    workers = set(active_children()) - others
    with suppress(ValueError):  # not the main thread, where torch sets no handler
        signal.signal(signal.SIGCHLD, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield from source
    except (RuntimeError, OSError, EOFError) as error:
        codes = _end(workers)
        if not codes and not str(error).startswith("DataLoader worker (pid"):
            raise
        reason = f"exit code {codes[0]}" if codes else str(error)
        raise UserError(
            f"a process that reads data has died ({reason}), often because memory ran out: use fewer "
            "--num_workers (0 reads in this process), a smaller batch, or a larger /dev/shm"
        ) from error
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(_RAISED)) from None


def _end(workers: Collection[BaseProcess]) -> list[int | None]:
    """End all processes; exit codes of those that had died before.

    The others ignore SIGTERM, and may wait forever for a lock that a dead one holds.
    """
    ended = wait([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers if worker.sentinel in ended]


def _indexed(
    batch: Callable[[Sequence[Pick]], tuple[Tensor, Tensor]], picks: list[list[Pick]]
) -> Iterator[tuple[Tensor, Tensor]]:
    for pick in picks:
        yield batch(pick)
