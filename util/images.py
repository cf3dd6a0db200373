"""Images as files: conversion to bytes, reading, atomic PNGs, contact sheets.

A PNG gets its final name only when it is complete, so an interrupted run leaves no partial images
and the same command can continue from the names that exist. An image is uint8 (H, W, 3) RGB, a batch
(B, H, W, 3).
"""

import io
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from util.errors import UserError
from util.files import atomic_path

# torchvision.datasets.folder.IMG_EXTENSIONS, which the original trains on
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NUMBERED = re.compile(r"[0-9]{5,}\.png")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"  # PNG specification, section 5.2
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # section 11.2.5: empty IEND chunk with its CRC
_CAPTION_GAP = 2  # pixels above and below a caption


def png_name(index: int) -> str:
    """File name of image `index`: five digits, more when it needs them (MAR's `%05d.png`)."""
    return f"{index:05d}.png"


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Decoder output in [-1, 1] to bytes: round(clip((x + 1) / 2 * 255, 0, 255)), as MAR saves it.

    (B, 3, H, W) of any float dtype => the same shape in uint8, on the same device.
    """
    scaled = (images.detach().float() + 1) / 2 * 255
    return scaled.clamp(0, 255).round().to(torch.uint8)


def find_broken(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) => (B,) bool on the same device: images with a value that is NaN or infinite."""
    return (~torch.isfinite(images)).flatten(1).any(dim=1)


def refuse_broken(broken: torch.Tensor) -> None:
    """UserError if any of (B,) images is broken: its bytes would be arbitrary."""
    if broken.any():
        raise UserError(
            f"{int(broken.sum())} of {len(broken)} decoded images contain NaN or infinity; "
            "use bfloat16 or float32 (float16 overflows) and check the checkpoint"
        )


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Decoder output (B, 3, H, W) in [-1, 1] => (B, H, W, 3) uint8. UserError if one is broken."""
    refuse_broken(find_broken(images))
    return to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a picture, uint8 (H, W, 3), atomically. Raises UserError when it cannot be written."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def is_complete_png(path: str | os.PathLike) -> bool:
    """Whether the file begins as a PNG and ends with the IEND chunk; reads 20 bytes."""
    try:
        with open(path, "rb") as file:
            if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
                return False
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file of 8 bits per channel; UserError naming a file that cannot be used.

    Training, caching, statistics and scores all read images with this function.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(_PNG_SIGNATURE) and _PNG_END not in data:
            raise ValueError("it is truncated")
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            rgb = None if mode.startswith(("I", "F")) else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "its format is unknown"
        raise UserError(f"{path} cannot be read as an image ({reason}): replace it") from error
    if rgb is None:  # Pillow would clip 16 bits to white
        raise UserError(f"{path} has more than 8 bits per channel (mode {mode}): convert it to RGB")
    return rgb


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """open_rgb as an array, uint8 (H, W, 3)."""
    return np.array(open_rgb(path))


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder, not of those in it, in the order of their path strings."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check its path")
    images = (f for f in folder.iterdir() if is_image_name(f.name) and not f.is_dir())
    return sorted(images, key=str)


def is_image_name(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones do not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def check_numbered(images: Sequence[Path], below: int | None = None) -> None:
    """UserError if an image is not named by its number, which is less than `below` if that is given,
    or if two have the same number, such as 00000.png and 000000.png."""
    foreign = [
        image.name
        for image in images
        if not _NUMBERED.fullmatch(image.name) or (below and int(image.stem) >= below)
    ]
    if foreign:
        named = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(
            f"{images[0].parent} holds {len(foreign)} image(s) that are not numbered like "
            f"{png_name(0)}{f', below {below}' if below else ''} ({named}); move them away, or they "
            "would be scored"
        )
    by_number: dict[int, Path] = {}
    for image in images:
        other = by_number.setdefault(int(image.stem), image)
        if other != image:
            raise UserError(f"{other} and {image.name} have the same number; move one of them away")


def list_numbered_pngs(folder: str | os.PathLike[str], num_images: int) -> list[Path]:
    """The `num_images` generated images 00000.png, 00001.png, ... of a folder, by their number.

    UserError for other image files, because other tools would score them too. Files that are not images
    are ignored.
    """
    images = list_images(folder)
    check_numbered(images)
    if len(images) != num_images:
        raise UserError(
            f"{folder} holds {len(images)} images, but {num_images} are to be scored; "
            "finish the generation, or score a folder of this run alone"
        )
    images.sort(key=lambda image: int(image.stem))
    for index, image in enumerate(images):
        if int(image.stem) != index:  # or an image would be scored under the label of another
            raise UserError(
                f"{folder} holds {image.name}, but no {png_name(index)}: image i is named by its "
                f"number, from {png_name(0)} to {png_name(num_images - 1)}"
            )
    return images


class PngWriter:
    """Writes PNGs in threads while the next batch is generated; at most `capacity` wait in memory.

    with PngWriter() as writer:
        writer.write(folder / png_name(7), image)

    The first failure is raised in the caller, as UserError where the file system refused, by the
    next `write` or at the end of the block; images still waiting are then dropped.
    """

    def __init__(self, threads: int = 4, capacity: int = 256) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._free = threading.Semaphore(capacity)
        self._error: Exception | None = None

    def __enter__(self) -> "PngWriter":
        return self

    def write(self, path: str | os.PathLike, image: np.ndarray) -> None:
        """Queue one image, uint8 (H, W, 3), which the caller must not change afterwards."""
        self._free.acquire()
        if self._error is not None:
            raise self._error
        self._pool.submit(self._save, path, image)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._pool.shutdown()
        if error is None and self._error is not None:
            raise self._error

    def _save(self, path: str | os.PathLike, image: np.ndarray) -> None:
        try:
            if self._error is None:
                save_png(path, image)
        except Exception as error:
            self._error = error
        finally:
            self._free.release()


def contact_sheet(images: np.ndarray, columns: int, padding: int = 2, scale: int = 1) -> np.ndarray:
    """Images in a white grid, row by row.

    (N, H, W, 3) uint8 => (H', W', 3) uint8. `padding` is in pixels; `scale` repeats each pixel.
    """
    from torchvision.utils import make_grid  # a second of import that few callers need

    cells = images.repeat(scale, axis=1).repeat(scale, axis=2)
    grid = make_grid(torch.from_numpy(cells).permute(0, 3, 1, 2), columns, padding, pad_value=255)
    sheet: np.ndarray = grid.permute(1, 2, 0).numpy()
    return sheet


def side_by_side_sheet(rows: dict[str, np.ndarray], padding: int = 2, scale: int = 1) -> np.ndarray:
    """One captioned row of images per method, the same seeds in the same columns.

    Each value is uint8 (N, H, W, 3) with the same N => (H', W', 3) uint8. MAR above LazyMAR:
    `side_by_side_sheet({"MAR": plain, "LazyMAR": lazy})`.
    """
    counts = {name: len(images) for name, images in rows.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"rows of different length: {counts}")
    strips = [contact_sheet(x, len(x), padding, scale) for x in rows.values()]
    width = max(strips[0].shape[1], *(_caption_width(name) + 2 * padding for name in rows))
    captioned = zip(strips, rows, strict=True)
    return np.concatenate([_captioned(*pair, width, padding) for pair in captioned])


def _captioned(picture: np.ndarray, caption: str, width: int, indent: int) -> np.ndarray:
    """The picture below its caption, on white of the given width."""
    top = _caption_height()
    canvas = Image.new("RGB", (width, top + picture.shape[0]), "white")
    font = ImageFont.load_default()
    ImageDraw.Draw(canvas).text((indent, _CAPTION_GAP), caption, "black", font)
    canvas.paste(Image.fromarray(picture), (0, top))
    return np.array(canvas)


def _caption_height() -> int:
    bottom = ImageFont.load_default().getbbox("Ag")[3]
    return int(np.ceil(bottom)) + 2 * _CAPTION_GAP


def _caption_width(text: str) -> int:
    return int(np.ceil(ImageFont.load_default().getlength(text)))
