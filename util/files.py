"""Files that are whole or not there: atomic writing, digests, JSON."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from util.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
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


def write_json(path: Path, document: Mapping[str, object] | Sequence[object]) -> None:
    """Write a document atomically, readable by people."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
