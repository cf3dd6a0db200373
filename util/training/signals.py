"""A polite end: the first SIGTERM or Ctrl-C stops the run at the next step, the second at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to end while there was nothing to be saved."""


class StopRequest:
    """`requested` turns true on the first SIGTERM or SIGINT while inside the `with` block."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request raises Stopped: for work of which no more than a batch can be lost."""
        if self.requested:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if self._at_once:
            self._at_once = False
            raise Stopped
        if again:
            raise KeyboardInterrupt
