"""Class folders on disk, ROOT/CLASS/**/FILE: which files are there, of which class, how large."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.errors import UserError

NAMED_AT_MOST = 5  # files in one sentence


@dataclass(frozen=True)
class ClassFolders:
    """Files (path, label) by class and path; label i belongs to classes[i], in the order of names.

    sizes: bytes of each file (N,). skipped: how many files have another extension, skipped_path is
    one of them.
    """

    root: Path
    classes: tuple[str, ...]
    samples: list[tuple[str, int]]
    sizes: np.ndarray
    skipped: int
    skipped_path: str

    @classmethod
    def scan(cls, root: str | Path, extensions: Sequence[str]) -> "ClassFolders":
        """Look at every name and size, and into no file. Hidden files and folders do not count.

        UserError: no such folder, no class folder, a class without files, empty files.
        """
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no data folder at {root}: files are looked for in {root}/CLASS/*")
        try:
            classes = sorted(
                entry.name
                for entry in os.scandir(root)
                if entry.is_dir() and not entry.name.startswith(".")
            )
            samples, sizes, others = [], [], []
            for label, name in enumerate(classes):
                found = []
                for path, size in _files_below(root / name):
                    if path.lower().endswith(tuple(extensions)):
                        found.append((path, size))
                    else:
                        others.append(path)
                if not found:
                    raise UserError(f"{root / name} holds no files {', '.join(extensions)}")
                for path, size in sorted(found):
                    samples.append((path, label))
                    sizes.append(size)
        except OSError as error:
            raise UserError(f"cannot look through {root} ({error})") from error
        if not samples:
            raise UserError(f"{root} must hold one folder per class, it holds no folder")
        empty = [path for (path, _), size in zip(samples, sizes, strict=True) if size == 0]
        if empty:
            raise UserError(f"{name_some(empty)} of 0 bytes: remove or replace what is empty")
        example = others[0] if others else ""
        return cls(root, tuple(classes), samples, np.array(sizes), len(others), example)


def name_some(paths: Sequence[str]) -> str:
    """The first few paths and how many more there are, as part of a sentence."""
    more = len(paths) - NAMED_AT_MOST
    return ", ".join(paths[:NAMED_AT_MOST]) + (f" and {more} more files" if more > 0 else "")


def _files_below(folder: Path) -> Iterator[tuple[str, int]]:
    """Path and bytes of each file; a link to nothing has 0."""
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    there = not entry.is_symlink() or os.path.exists(entry.path)
                    yield entry.path, entry.stat().st_size if there else 0
