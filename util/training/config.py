"""TrainConfig: length, checkpoints and log of a training run."""

from dataclasses import dataclass

from util.config import setting
from util.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """A training run. UserError if nothing is left to train."""

    batch_size: int = setting(16, "images per step and process", least=1)
    accum_iter: int = setting(1, "batches per process whose gradients are added", least=1)
    epochs: int = setting(400, "length of the schedule", least=1)
    start_epoch: int = setting(0, "first epoch when nothing is resumed", least=0)
    max_steps: int | None = setting(None, "stop after this many steps", least=1)
    compile: bool = setting(False, "torch.compile blocks and head for training")
    evaluate: bool = setting(False, "only evaluate the checkpoint of --resume")
    online_eval: bool = setting(False, "evaluate during training")
    eval_freq: int = setting(40, "epochs between two evaluations", least=1)
    save_last_freq: int = setting(5, "epochs between two checkpoints", least=1)
    save_minutes: float | None = setting(None, "also save every so many minutes", least=0)
    log_freq: int = setting(20, "steps between two lines of the log", least=1)
    seed: int = setting(1, "seed of all random draws", least=0, most=2**63 - 1)
    output_dir: str = setting("./output_dir", "checkpoints, images, log", metavar="DIR")
    log_dir: str | None = setting(None, "TensorBoard files; default --output_dir", metavar="DIR")
    overwrite: bool = setting(False, "replace a run of another configuration")

    def __post_init__(self) -> None:
        if self.start_epoch >= self.epochs:
            raise UserError(f"--start_epoch {self.start_epoch} is not below --epochs {self.epochs}")
