"""Class folders on disk, ROOT/CLASS/**/FILE: which files are there, of which class, how large."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.errors import UserError
from util.files import files_below

NAMED_AT_MOST = 5  # files in one sentence


@dataclass(frozen=True)
class ClassFolders:
    """Files (path, label) by class and path; label i belongs to classes[i], in alphabetical order.

    sizes: bytes of each file (N,). skipped: number of files in the class folders with another
    extension; skipped_path is one of them. outside: files with the extension outside class folders.
    """

    root: Path
    classes: tuple[str, ...]
    samples: list[tuple[str, int]]
    sizes: np.ndarray
    skipped: int
    skipped_path: str
    outside: tuple[str, ...]

    @classmethod
    def scan(cls, root: str | Path, extensions: Sequence[str]) -> "ClassFolders":
        """List all names and sizes without opening a file. Hidden files and folders are ignored.

        Links are followed. In a class, each folder counts once; a link back to `root` is not a class.
        UserError: no such folder, no class folder, a class without files, empty files.
        """
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no data folder at {root}: files are looked for in {root}/CLASS/*")
        closed = [root.resolve(), *root.resolve().parents]
        try:
            entries = sorted(e for e in os.listdir(root) if not e.startswith("."))
            folders = [root / name for name in entries if (root / name).is_dir()]
            classes = [folder.name for folder in folders if folder.resolve() not in closed]
            lost = [str(root / name) for name in entries if not (root / name).exists()]
            outside = tuple(
                str(root / name)
                for name in entries
                if name.lower().endswith(tuple(extensions)) and not (root / name).is_dir()
            )
            samples, sizes, others = [], [], []
            for label, name in enumerate(classes):
                found = []
                for path, size in files_below(root / name, closed):
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
        if lost:
            raise UserError(f"{name_some(lost)} is a link to nothing: remove or replace it")
        if not samples:
            raise UserError(f"{root} must hold one folder per class, it holds no folder")
        empty = [path for (path, _), size in zip(samples, sizes, strict=True) if size == 0]
        if empty:
            are, them = ("is", "it") if len(empty) == 1 else ("are", "them")
            raise UserError(f"{name_some(empty)} {are} empty: remove or replace {them}")
        example = others[0] if others else ""
        return cls(root, tuple(classes), samples, np.array(sizes), len(others), example, outside)

    def notes(self) -> list[str]:
        """Sentences about files that are not used."""
        found = []
        if self.skipped:
            found.append(unused(self.skipped, self.skipped_path))
        if self.outside:
            found.append(
                f"{len(self.outside)} file(s) outside the class folders are not used, such as "
                f"{self.outside[0]}"
            )
        return found


def unused(count: int, example: str) -> str:
    """A sentence about files that are no data."""
    return f"{count} file(s) of another kind are not used, such as {example}"


def name_some(paths: Sequence[str]) -> str:
    """The first few paths and how many more there are, as part of a sentence."""
    more = len(paths) - NAMED_AT_MOST
    return ", ".join(paths[:NAMED_AT_MOST]) + (f" and {more} more files" if more > 0 else "")
