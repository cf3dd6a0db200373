"""The pipeline of batches, driven by a generator that draws flat pictures."""

import threading

import pytest
import torch

from util.errors import UserError
from util.evaluation.batches import BatchGrid, Task, jobs_of
from util.evaluation.conditions import ClassLabels
from util.evaluation.generation import FeatureSink, PngSink, produce
from util.images import png_name, read_image

CPU = torch.device("cpu")
TASK = Task(BatchGrid.create(10, 4), ClassLabels(10), seed=0)


class Flat:
    """Row r is a flat picture of ten times its label."""

    def __init__(self, broken=-1):
        self.broken, self.threads, self.sizes = broken, set(), []

    def prepare(self, labels, seeds):
        self.threads.add(threading.get_ident())
        return torch.tensor(labels)

    def generate(self, labels):
        self.sizes.append(len(labels))
        images = (labels * 20 / 255 - 1)[:, None, None, None].expand(-1, 3, 8, 8)
        return torch.where((labels == self.broken)[:, None, None, None], torch.nan, images)


def make(generator, folder, rank=0, size=1, missing=list):
    jobs = jobs_of(TASK.grid, rank, size, missing)
    return produce(generator, TASK, jobs, PngSink(lambda i: folder / png_name(i), 4), CPU)


def test_every_image_is_written_once_and_every_batch_has_the_same_rows(tmp_path):
    generator = Flat()
    made = make(generator, tmp_path)
    assert generator.sizes == [4, 4, 4]
    assert (made.images, made.computed) == (10, 10)
    assert 0 < made.seconds <= made.wall_seconds
    values = [int(read_image(tmp_path / png_name(i))[0, 0, 0]) for i in range(10)]
    assert values == [10 * i for i in range(10)]
    assert len(list(tmp_path.iterdir())) == 10


def test_only_what_is_missing_is_written(tmp_path):
    made = make(Flat(), tmp_path, missing=lambda indices: [i for i in indices if i in (1, 9)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001.png", "00009.png"]
    assert (made.images, made.computed) == (2, 6)


def test_a_process_without_anything_to_do_makes_nothing(tmp_path):
    made = make(Flat(), tmp_path, rank=7, size=8)
    assert (made.images, made.computed, made.seconds) == (0, 0, 0)


def test_batches_are_prepared_in_another_thread(tmp_path):
    generator = Flat()
    make(generator, tmp_path)
    assert threading.get_ident() not in generator.threads


@pytest.mark.parametrize("label", [1, 9])
def test_an_image_that_is_not_finite_ends_the_run_and_is_not_written(tmp_path, label):
    with pytest.raises(UserError, match="of 4 decoded images contain NaN"):
        make(Flat(broken=label), tmp_path)
    assert not (tmp_path / png_name(label)).exists()
    assert (tmp_path / png_name(0)).exists() == (label == 9)


@pytest.mark.parametrize("method", ["prepare", "generate"])
def test_a_failing_model_ends_the_run_and_keeps_what_is_made(tmp_path, method):
    generator = Flat()
    works = getattr(generator, method)

    def fails(batch, *rest):
        if int(batch[0]) == 8:
            raise RuntimeError("out of memory")
        return works(batch, *rest)

    setattr(generator, method, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        make(generator, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [png_name(i) for i in range(8)]


def test_images_that_are_scored_as_they_come_are_bytes_without_padding():
    seen = {}

    def update(indices, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 8, 8)
        seen.update(zip(indices, pixels[:, 0, 0, 0].tolist(), strict=True))

    produce(Flat(), TASK, jobs_of(TASK.grid, 0, 1, list), FeatureSink(update), CPU)
    assert seen == {i: 10 * i for i in range(10)}
    with pytest.raises(UserError, match="NaN"):
        produce(Flat(9), TASK, jobs_of(TASK.grid, 0, 1, list), FeatureSink(update), CPU)


def test_more_images_than_may_wait_are_all_written(tmp_path):
    task = Task(BatchGrid.create(600, 2), ClassLabels(10), seed=0)
    sink = PngSink(lambda i: tmp_path / png_name(i), 2)
    produce(Flat(), task, jobs_of(task.grid, 0, 1, list), sink, CPU)
    values = [int(read_image(tmp_path / png_name(i))[0, 0, 0]) for i in (0, 599)]
    assert len(list(tmp_path.iterdir())) == 600
    assert values == [0, 90]
