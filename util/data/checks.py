"""Opens training data and checks it before training starts.

Names, sizes and classes of all files are checked. One file of each class is read, and every cached
latent of unusual length; with --check_data all files are read.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util.data.class_folders import name_some
from util.data.config import DataConfig
from util.data.datasets import CachedFolder, CachedTensors, ImageFolder
from util.data.latents import check_note
from util.dist import World
from util.errors import UserError
from util.files import read_json, write_json

IN_MEMORY_BELOW = 4 << 30  # bytes of cached latents that are read into memory by default
CLASSES = "classes.json"
UNUSUAL_AT_MOST = 1000  # files read for their length; more are not unusual
SPREAD = (0.5, 2.0)  # deviations of the latents that fit the noise schedule, which is made for 1

TrainingData = ImageFolder | CachedFolder | CachedTensors


@dataclass(frozen=True)
class DataShape:
    """Shape of a model's data. latent_shape: (C, h, w); tokenizer_files: those of the latents."""

    img_size: int
    latent_shape: tuple[int, int, int]
    class_num: int
    tokenizer_files: tuple[str, ...]


def open_data(config: DataConfig, shape: DataShape, world: World | None = None) -> TrainingData:
    """Training data, checked against the model's geometry. UserError if they disagree."""
    world = world or World()
    data: ImageFolder | CachedFolder
    if not config.use_cached:
        if config.cached_path:
            note("--cached_path has no effect without --use_cached: training from images", world)
        data = ImageFolder(Path(config.data_path) / "train", shape.img_size)
    else:
        if config.cached_path is None:
            raise UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
        channels, *sides = shape.latent_shape
        data = CachedFolder(config.cached_path, (2 * channels, *sides))
        check_note(config.cached_path, shape.tokenizer_files, shape.img_size)
    _check_classes(data, shape.class_num, world)
    check_files(data, world, every=config.check_data, threads=config.num_workers)
    if isinstance(data, CachedFolder):
        size, in_memory = data.memory_bytes(), config.cache_in_memory
        if in_memory or (in_memory is None and size < IN_MEMORY_BELOW):
            if world.is_main:
                print(f"reading {size / 2**30:.2f} GiB of latents into memory", flush=True)
            return CachedTensors(data)
    return data


def note(text: str, world: World) -> None:
    """Print a note for the user on stderr, in the main process only."""
    if world.is_main:
        print(f"note: {text}", file=sys.stderr, flush=True)


def _check_classes(data: ImageFolder | CachedFolder, class_num: int, world: World) -> None:
    count = len(data.files.classes)
    if count > class_num:
        raise UserError(
            f"the data have {count} classes, the model {class_num}: give --class_num {count}"
        )
    if count < class_num:
        note(
            f"the data have {count} classes, the model {class_num}: classes from {count} on "
            f"are never trained but would be sampled; give --class_num {count}",
            world,
        )
    for text in data.files.notes():
        note(text, world)


def unusual(data: CachedFolder) -> list[int]:
    """Indices of files that are not as long as most: npz files of one shape have one length.

    Empty if very many differ, as compressed files do.
    """
    lengths, counts = np.unique(data.files.sizes, return_counts=True)
    odd = np.flatnonzero(data.files.sizes != lengths[counts.argmax()])
    return odd.tolist() if len(odd) <= UNUSUAL_AT_MOST else []


def check_files(
    data: ImageFolder | CachedFolder, world: World, every: bool = False, threads: int = 0
) -> None:
    """Read the first file of each class and those of unusual length, or every file in full.

    The processes of a run share the files. UserError naming those that cannot be used.
    """
    if every:
        chosen: Sequence[int] = range(len(data))
    else:
        firsts = np.unique([label for _, label in data.files.samples], return_index=True)[1]
        more = unusual(data) if isinstance(data, CachedFolder) else []
        chosen = sorted({*firsts.tolist(), *more})
    mine = chosen[world.rank :: world.size]
    errors = []
    hide = None if world.is_main and every else True
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(mine), desc="checking data", unit="file", disable=hide) as bar,
    ):
        for start in range(0, len(mine), 1024):
            part = mine[start : start + 1024]
            errors += [e for e in pool.map(lambda i: _error_of(data, i, every), part) if e]
            bar.update(len(part))
    if len(errors) == 1:
        raise UserError(errors[0][1])
    if len(errors) == len(mine) > 0:
        raise UserError(f"{errors[0][1]} (the same holds for all {len(mine)} files read)")
    if errors:
        raise UserError(
            f"{len(errors)} of {len(mine)} files cannot be used: {name_some([p for p, _ in errors])}; "
            f"the first: {errors[0][1]}"
        )


def _error_of(
    data: ImageFolder | CachedFolder, index: int, mirrored: bool
) -> tuple[str, str] | None:
    """Path and error message of a file that cannot be used."""
    try:
        data[(index, False)]
        if mirrored and isinstance(data, CachedFolder):
            data[(index, True)]
    except UserError as error:
        return data.files.samples[index][0], str(error)
    return None


def record_classes(folder: str | Path, classes: Sequence[str]) -> None:
    """Write the class names in the order of their labels to classes.json in the folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror})") from error
    write_json(Path(folder) / CLASSES, classes)


def check_same_classes(folder: str | Path, classes: Sequence[str]) -> None:
    """UserError if the run in `folder` was trained on other classes: labels would change their meaning."""
    path = Path(folder) / CLASSES
    if not path.is_file():
        return
    before = read_json(path, list, "restore or remove it")
    for label, (old, new) in enumerate(zip(before, classes, strict=False)):
        if old != new:
            raise UserError(
                f"label {label} was class '{old}' and is '{new}' now: a run that is resumed needs "
                f"the class folders it began with ({path})"
            )
    if len(before) != len(classes):
        raise UserError(
            f"the run began with {len(before)} classes, now there are {len(classes)}: a run that is "
            f"resumed needs the class folders it began with ({path})"
        )


def check_spread(latents: Tensor, scale: float, world: World) -> None:
    """A note if scaled latents (B, C, h, w) are far from a standard deviation of 1."""
    spread = latents.float().std().item()
    if not SPREAD[0] < spread < SPREAD[1]:
        note(
            f"the latents' standard deviation is {spread:.3g} with --latent_scale {scale:.4g}; "
            f"the noise schedule is made for 1: try --latent_scale {scale / spread:.4g}",
            world,
        )


def some_items(data: TrainingData, count: int = 16) -> Tensor:
    """Images or moments (B, ...) spread evenly over the classes."""
    indices = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist()
    picks = [(index, False) for index in indices]
    if isinstance(data, CachedTensors):
        return data.batch(picks)[0]
    return torch.stack([data[pick][0] for pick in picks])
