"""Errors that the user can fix: one sentence on stderr and exit code 2, never a traceback."""

import errno
import sys
from collections.abc import Callable

from util import streams

# Part of an error's type and message, in lower case -> what to do about it.
_REMEDIES = {
    "too many open files": "use fewer --num_workers, or raise `ulimit -n`",
    "ancdata": "too many files are open: use fewer --num_workers, or raise `ulimit -n`",
    "can't start new thread": "use fewer --num_workers, or raise `ulimit -u`",
    "resource temporarily unavailable": "use fewer --num_workers, or raise `ulimit -u`",
    "</torch_": "shared memory ran out: use fewer --num_workers (0 reads in this process), a smaller "
    "batch, or a larger /dev/shm",
    **dict.fromkeys(
        (
            *("memoryerror", "outofmemoryerror", "out of memory", "alloc_failed"),
            *("not enough memory", "can't allocate memory", "cannot allocate memory"),
        ),
        "memory ran out: use a smaller batch (--batch_size or --eval_bsz, --vae_bsz), fewer "
        "--num_workers, or a lower precision",
    ),
}

# What a file system answers where a file cannot be read or written, whoever asks.
_REFUSALS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_REFUSALS |= {errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
_REFUSALS |= {errno.EFBIG, errno.ESTALE, errno.ENOTCONN}  # a limit, NFS and FUSE


class UserError(Exception):
    """Bad input, missing file, impossible combination. The message says what, which value, what to do."""


class WeightsError(UserError, ValueError):
    """A file of weights or statistics that does not fit; also a ValueError, for library users."""


def sentence_of(error: BaseException) -> str | None:
    """The message for a user, or None for a bug, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return (
            f"cannot use {error.filename or 'a file'} ({error.strerror}): check that its folder exists, "
            "is writable and has free space, or choose another"
        )
    text = " ".join([type(error).__name__, *str(error).split()])
    for mark, remedy in _REMEDIES.items():
        if mark in text.lower():
            lines = (str(error).strip() or type(error).__name__).splitlines()
            reason = next((line for line in lines if mark in line.lower()), lines[0]).strip()
            return f"{reason.rstrip('.: ')}: {remedy}"
    return None


def run_main(main: Callable[[], None]) -> None:
    """Run a command with robust streams; an error that sentence_of knows becomes one line, exit code 2."""
    streams.secure()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
