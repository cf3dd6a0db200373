"""A polite end: the first SIGTERM or Ctrl-C stops the run at the next step, the second at once."""

import signal
from types import FrameType


class StopRequest:
    """`requested` turns true on the first SIGTERM or SIGINT while inside the `with` block."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
