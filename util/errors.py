"""Errors that are the user's to mend: one sentence on stderr and exit code 2, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input, missing file, impossible combination. The message says what, which value, what to do."""


class WeightsError(UserError, ValueError):
    """A file of weights or statistics that does not fit; a ValueError for the library's own users."""


def run_main(main: Callable[[], None]) -> None:
    """Run a command; turn UserError into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
