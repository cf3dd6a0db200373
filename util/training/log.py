"""Log of a training run: a line on the terminal, one in log.jsonl, TensorBoard if installed."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError
from util.files import atomic_path

SummaryWriter: Any
try:
    from torch.utils import tensorboard

    SummaryWriter = tensorboard.SummaryWriter
except ImportError:  # an optional dependency
    SummaryWriter = None


class RunLog:
    """Appends to `output_dir/log.jsonl`. A full disk loses lines of the log but does not stop the run."""

    def __init__(self, output_dir: str | Path, log_dir: str | Path, step: int = 0) -> None:
        """step: steps that are done. Log lines of later steps are dropped."""
        path = Path(output_dir) / "log.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._board = None
            if SummaryWriter:
                path = Path(log_dir)
                self._board = SummaryWriter(str(log_dir), purge_step=step + 1)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}): choose another --output_dir or --log_dir"
            ) from error
        self._noted = False

    def close(self) -> None:
        self._try(self._file.close)
        if self._board:
            self._try(self._board.close)

    def write(self, step: int, **values: float) -> None:
        """One line of numbers; TensorBoard gets each of them as a curve over `step`."""
        print("  ".join([f"step {step}", *(f"{k} {v:.6g}" for k, v in values.items())]), flush=True)
        self._try(lambda: self._append(json.dumps({"step": step, **values}) + "\n"))
        if self._board:
            for name, value in values.items():
                self._try(partial(self._board.add_scalar, name, value, step))

    def show(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), for TensorBoard."""
        if self._board:
            self._try(partial(self._board.add_image, name, image, step, dataformats="HWC"))

    def _append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._noted:
                print(f"note: the log cannot be written ({error})", file=sys.stderr, flush=True)
            self._noted = True


def _drop_after(path: Path, step: int) -> None:
    """Keep complete lines of steps up to `step`: a resumed run writes the later ones again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    steps = [_step_of(line) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    if kept != lines:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    if broken := steps.count(None):
        print(f"note: {broken} damaged line(s) of {path} are dropped", file=sys.stderr, flush=True)


def _step_of(line: bytes) -> int | None:
    """The step of a line of the log, None for one that was cut off or damaged."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) and step >= 0 else None
