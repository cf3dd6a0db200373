"""Log of a training run: a line on the terminal, one in log.jsonl, TensorBoard if installed."""

import json
from pathlib import Path

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # an optional dependency
    SummaryWriter = None


class RunLog:
    """Appends to `output_dir/log.jsonl`."""

    def __init__(self, output_dir: str | Path, log_dir: str | Path) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._file = (Path(output_dir) / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(log_dir)) if SummaryWriter else None

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, step: int, **values: float) -> None:
        """One line of numbers; TensorBoard gets each of them as a curve over `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        print("  ".join([f"step {step}", *(f"{k} {v:.6g}" for k, v in values.items())]), flush=True)
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
