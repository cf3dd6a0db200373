"""Standard streams that do not fail when they are closed, full, or cannot encode a character.

A command may run for days after its terminal, pipe or disk is gone. So output that cannot be written
is dropped, after one note on stderr, and characters that cannot be encoded are escaped.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Dropping(io.RawIOBase):
    """Writes to a file descriptor until that fails; then drops everything."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name, self._lost = descriptor, name, False

    def write(self, data: "ReadableBuffer") -> int:
        """All of the data counts as written, even when it is dropped."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and not self._lost:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # a pipe whose other end set O_NONBLOCK
                select.select([], [self._descriptor], [])
            except OSError as error:
                self._lost = True
                if self._name != "stderr":
                    print(f"note: {self._name} is lost ({error.strerror})", file=sys.stderr)
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def secure() -> None:
    """Replace sys.stdout and sys.stderr by streams that do not raise; call it first in a command.

    Streams that were already replaced (by a test or a notebook) stay as they are.
    """
    for descriptor in range(3):  # else the next file opened would be taken for a standard stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _secured(stream, name))


def _secured(stream: TextIO | None, name: str) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):  # None: closed before the start
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    with suppress(OSError):
        stream.flush()
    raw = _Dropping(stream.fileno(), name)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
