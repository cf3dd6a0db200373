"""Atomic file writing, digests, JSON."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from util.errors import UserError

Document = TypeVar("Document", dict[str, Any], list[Any])
_NAMES = {dict: "object", list: "list"}  # JSON's words


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name if the block succeeds.

    Raises UserError when the file system refuses (disk full, read-only, missing folder); the
    temporary file is removed and an older file of that name stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); "
            "check that the folder exists, is writable and has free space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def beside_code(path: str) -> str:
    """A relative path, or the path below the folder of the code if the file exists only there."""
    other = Path(__file__).parents[1] / path
    return str(other) if other.exists() and not Path(path).exists() else path


def files_below(folder: Path, closed: Iterable[Path] = ()) -> Iterator[tuple[str, int]]:
    """Path and size of each file below a folder, hidden ones excluded.

    Links are followed and each folder is entered once, so a loop ends. A broken link has 0 bytes.
    closed: resolved folders that are not entered.
    """
    seen = set(closed)
    folders = [folder]
    while folders:
        current = folders.pop()
        if current.resolve() in seen:
            continue
        seen.add(current.resolve())
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                is_link = entry.is_symlink()  # which may lead nowhere, or to itself
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    folders.append(Path(entry.path))
                else:
                    there = not is_link or os.path.exists(entry.path)
                    yield entry.path, entry.stat().st_size if there else 0


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, document: Mapping[str, object] | Sequence[object]) -> None:
    """Write a document atomically, readable by people."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def read_json(path: Path, kind: type[Document], remedy: str) -> Document:
    """A JSON document that must be a dict or a list.

    UserError with the remedy for a file that is missing, damaged, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {_NAMES[kind]}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    return found


def hub_weights(folder: Path) -> list[Path]:
    """The files of weights of a model's folder as the Hugging Face Hub has them, safetensors first.

    UserError if the folder holds none, or a part is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index, dict, "download it again").get("weight_map", {})
            names = sorted(set(parts.values()))
        else:
            names = [name]
        missing = [part for part in names if not (folder / part).is_file()]
        if index.is_file() and missing:
            raise UserError(f"{folder} lacks {missing[0]}: download it again")
        if not missing:
            return [folder / part for part in names]
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
