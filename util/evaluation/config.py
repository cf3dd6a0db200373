"""EvaluationConfig: which images a run makes, and what it keeps."""

from dataclasses import dataclass

from util.config import setting
from util.errors import UserError
from util.evaluation.batches import SEED_MODES


@dataclass(frozen=True)
class EvaluationConfig:
    """A run of `num_images` images. UserError if the settings contradict each other."""

    num_images: int = setting(50000, "images to generate", least=1)
    eval_bsz: int = setting(64, "images per batch", least=1)
    prompts: str | None = setting(
        None,
        "text-to-image: prompts, one per line, or JSON lines, or COCO captions",
        metavar="FILE",
    )
    seed: int = setting(1, "seed of all random draws", least=0)
    seed_mode: str = setting(
        "image", "one seed per image, or per process as in the original", choices=SEED_MODES
    )
    output_dir: str = setting("./output_dir", "parent of the run folders", metavar="DIR")
    overwrite: bool = setting(False, "replace a run of another configuration")
    no_score: bool = setting(False, "generate only")
    no_save: bool = setting(False, "score images as they are made and keep none")
    save_npz: bool = setting(False, "also write ADM's sample batch, samples.npz")
    dry_run: bool = setting(False, "print the plan and the time it would take")

    def __post_init__(self) -> None:
        if self.num_images < 2 and not self.no_score:
            raise UserError("--num_images is 1, but FID needs at least 2 images: add --no_score")
        if self.no_save and (self.no_score or self.save_npz):
            other = "--no_score" if self.no_score else "--save_npz"
            raise UserError(f"--no_save keeps no images, so {other} has nothing to work with")
