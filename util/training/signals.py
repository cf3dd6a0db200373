"""Graceful shutdown: a signal stops the run at the next step, a second SIGTERM or Ctrl-C at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INSISTENT = (signal.SIGTERM, signal.SIGINT)
# Also a terminal that is closed, a scheduler's warning, and the end of the CPU time.
STOP_SIGNALS = (*_INSISTENT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop while there was nothing to save."""


class StopRequest:
    """`requested` turns true on the first of STOP_SIGNALS while inside the `with` block.

    A SIGHUP that nohup ignores stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = self._insisted = False

    def __enter__(self) -> "StopRequest":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals = [s for s in STOP_SIGNALS if not (ignored and s == signal.SIGHUP)]
        self._before = {s: signal.signal(s, self._ask) for s in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request raises Stopped at once: for work that loses at most a batch."""
        if self.requested:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested, again = True, self._insisted and number in _INSISTENT
        self._insisted |= number in _INSISTENT
        if self._at_once:
            self._at_once = False
            raise Stopped
        if again:
            raise KeyboardInterrupt
