"""Images in batches for feature extraction, from a folder or a Dataset.

Read in the calling process and in the order of the names, without a DataLoader: an evaluation in
the middle of training must not draw from torch's global random generator, as a DataLoader does.
"""

import os
import sys
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.class_folders import ClassFolders, unused
from util.data.datasets import center_crop
from util.errors import UserError
from util.images import IMAGE_SUFFIXES, list_images, list_numbered_pngs, open_rgb

ImageSource = str | os.PathLike | Dataset  # a folder, or uint8 tensors with or without labels


class ImageFiles(Dataset):
    """Image files as (3, H, W) uint8 tensors; a batch is decoded by threads.

    With `img_size` each is resized and cropped as the training images are. Raises UserError for
    an unreadable file and for one of another size than the first.
    """

    def __init__(self, paths: Sequence[Path], img_size: int | None = None) -> None:
        self._paths, self._img_size = paths, img_size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = open_rgb(self._paths[index])
        if self._img_size is not None:
            return center_crop(image, self._img_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            first, *images = pool.map(self.__getitem__, [0, *indices])
        for index, image in zip(indices, images, strict=True):
            if image.shape != first.shape:
                raise UserError(
                    f"{self._paths[index]} has another size (height x width "
                    f"{image.shape[1]}x{image.shape[2]}) than {self._paths[0]} "
                    f"({first.shape[1]}x{first.shape[2]}); "
                    "images must be of one size, make_stats crops them with --img_size"
                )
        return images


class Pictures(Dataset):
    """An array (N, H, W, 3) uint8 as (3, H, W) tensors."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._images[index]).permute(2, 0, 1)


def open_source(source: ImageSource, num_images: int | None = None) -> Dataset:
    """A folder as a Dataset of its images; with `num_images`, of exactly that many numbered PNGs.

    UserError if the number differs or the folder holds an image file of another name.
    """
    if isinstance(source, Dataset):
        if num_images is not None and (count := image_count(source)) != num_images:
            raise UserError(f"the data set has {count} images, but {num_images} are to be scored")
        return source
    if num_images is not None:
        return ImageFiles(list_numbered_pngs(source, num_images))
    return ImageFiles(list_images(source))


def open_reference(folder: str | os.PathLike[str], img_size: int | None = None) -> Dataset:
    """The images of class folders, as in training, or of a folder without folders.

    Notes on stderr which files are not used. UserError as ClassFolders.scan.
    """
    flat = list_images(folder)
    folder = Path(folder)
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not any(path.is_dir() for path in visible):
        if others := sorted(set(visible) - set(flat)):
            print(f"note: {unused(len(others), str(others[0]))}", file=sys.stderr, flush=True)
        return ImageFiles(flat, img_size)
    files = ClassFolders.scan(folder, IMAGE_SUFFIXES)
    for text in files.notes():
        print(f"note: {text}", file=sys.stderr, flush=True)
    return ImageFiles([Path(path) for path, _ in files.samples], img_size)


def image_count(data: Dataset) -> int:
    """Its length, which torch's Dataset does not declare."""
    assert isinstance(data, Sized)
    return len(data)


def image_batches(
    source: Dataset, batch_size: int, part: range | None = None
) -> Iterator[tuple[range, torch.Tensor]]:
    """Indices and images (B, 3, H, W) uint8 in order, of all or of the indices in `part`.

    The last batch may be smaller. Labels of pairs are dropped.
    """
    part = range(image_count(source)) if part is None else part
    for start in range(0, len(part), batch_size):
        indices = part[start : start + batch_size]
        if hasattr(source, "__getitems__"):  # torch's protocol for reading a batch at once
            items = source.__getitems__(indices)
        else:
            items = [source[index] for index in indices]
        yield indices, torch.stack([item[0] if isinstance(item, tuple) else item for item in items])
