"""The batches of a run, fixed by its size.

Batch k holds the same images in the same rows for any number of processes and whatever is missing,
so every image is computed by the same kernels on the same shapes. Resuming with any number of
processes gives identical bits, and processes need no coordination.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from util.evaluation.conditions import Condition, Conditions

SEED_MODES = ("image", "rank")


@dataclass(frozen=True)
class BatchGrid:
    """num_images in batches of `rows` images; the last is padded with images that are discarded."""

    num_images: int
    rows: int

    @classmethod
    def create(cls, num_images: int, eval_bsz: int) -> "BatchGrid":
        """As few batches as eval_bsz allows, all of the same size: 130 images by 128 are 2 x 65."""
        batches = -(-num_images // eval_bsz)
        return cls(num_images, -(-num_images // batches))

    def __len__(self) -> int:
        return -(-self.num_images // self.rows)

    def padded(self, batch: int) -> range:
        """Indices of all rows of a batch, padding included."""
        return range(batch * self.rows, (batch + 1) * self.rows)

    def images(self, batch: int) -> range:
        """Indices of the images of a batch, without padding."""
        return range(batch * self.rows, min((batch + 1) * self.rows, self.num_images))

    def share(self, rank: int, size: int) -> range:
        """The batches of one of `size` processes: every size-th one, as in MAR."""
        return range(rank, len(self), size)


@dataclass(frozen=True)
class Task:
    """Condition and seed of each image of a run."""

    grid: BatchGrid
    all_conditions: Conditions
    seed: int
    seed_mode: str = "image"
    processes: int = 1  # only used by seed_mode "rank"

    def conditions(self, indices: Iterable[int]) -> Sequence[Condition]:
        """Class labels or prompts of these images."""
        return self.all_conditions.of(indices, self.grid.num_images)

    def seeds(self, batch: int) -> list[int]:
        """Seeds of all rows of a batch.

        Mode "image": one per image. Mode "rank": from seed + rank and the number of earlier batches of
        the process, as in the original, where images depend on the number of processes.
        """
        if self.seed_mode == "image":
            return [image_seed(self.seed, i) for i in self.grid.padded(batch)]
        turn, rank = divmod(batch, self.processes)
        words = np.random.SeedSequence((self.seed + rank, turn))
        return [int(word) for word in words.generate_state(self.grid.rows, np.uint64)]


@dataclass(frozen=True)
class Job:
    """A batch to compute, and those of its images that are wanted."""

    batch: int
    wanted: list[int]


def jobs_of(
    grid: BatchGrid, rank: int, size: int, missing: Callable[[Sequence[int]], list[int]]
) -> list[Job]:
    """The batches of a process in which images are missing; checks only its own images."""
    found = (Job(batch, missing(grid.images(batch))) for batch in grid.share(rank, size))
    return [job for job in found if job.wanted]


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` in a run with --seed `seed`; unique for each pair."""
    return (seed << 32) + index
