"""Which image is made where depends on the size of the run and of its batches, and on nothing else."""

import itertools

import pytest

from util.evaluation.batches import BatchGrid, Task, jobs_of
from util.evaluation.conditions import ClassLabels, image_label


@pytest.mark.parametrize(
    ("num_images", "eval_bsz", "rows", "batches"),
    [
        (100, 10, 10, 10),
        (11, 3, 3, 4),
        (130, 128, 65, 2),
        (2, 128, 2, 1),
        (1, 1, 1, 1),
        (9, 4, 3, 3),
    ],
)
def test_batches_are_few_and_of_one_size(num_images, eval_bsz, rows, batches):
    grid = BatchGrid.create(num_images, eval_bsz)
    assert (grid.rows, len(grid)) == (rows, batches)
    assert {len(grid.padded(batch)) for batch in range(batches)} == {rows}


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_processes_share_the_images_without_gap_or_overlap(size):
    grid = BatchGrid.create(50, 7)
    shares = [[i for b in grid.share(rank, size) for i in grid.images(b)] for rank in range(size)]
    assert sorted(itertools.chain(*shares)) == list(range(50))


def test_what_a_process_makes_does_not_depend_on_what_the_others_have_written():
    grid = BatchGrid.create(20, 4)
    present = {5}

    def missing(indices):
        return [i for i in indices if i not in present]

    before = jobs_of(grid, 1, 2, missing)
    present |= set(grid.images(0)) | set(grid.images(2))  # of process 0
    assert jobs_of(grid, 1, 2, missing) == before
    assert [(job.batch, job.wanted) for job in before] == [(1, [4, 6, 7]), (3, [12, 13, 14, 15])]
    present |= set(grid.images(1))
    assert [job.batch for job in jobs_of(grid, 1, 2, missing)] == [3]


def test_padding_has_the_last_label_and_seeds_that_no_image_has():
    task = Task(BatchGrid.create(10, 4), ClassLabels(5), seed=3)
    assert task.conditions(task.grid.padded(2)) == [4, 4, 4, 4]
    assert list(task.grid.images(2)) == [8, 9]
    seeds = [seed for batch in range(3) for seed in task.seeds(batch)]
    assert len(set(seeds)) == 12
    assert seeds[8:10] == [(3 << 32) + 8, (3 << 32) + 9]
    assert task.conditions(range(10)) == [image_label(i, 10, 5) for i in range(10)]


def test_seeds_that_follow_the_process_repeat_for_the_same_processes_and_change_with_their_number():
    grid = BatchGrid.create(24, 4)

    def seeds(processes):
        task = Task(grid, ClassLabels(5), 1, "rank", processes)
        return [tuple(task.seeds(batch)) for batch in range(6)]

    assert seeds(2) == seeds(2)
    assert len(set(seeds(2))) == 6
    assert seeds(2)[0] == seeds(1)[0]  # process 0, first batch
    assert seeds(2)[1] != seeds(1)[1]
    other = Task(grid, ClassLabels(5), 2, "rank", 2)
    assert tuple(other.seeds(0)) == seeds(2)[1]  # seed 2 + rank 0 is seed 1 + rank 1, as in MAR
