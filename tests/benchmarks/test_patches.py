"""benchmarks.patches: real pictures are near the reference, damaged ones are not."""

import numpy as np
import pytest
import torch

from benchmarks.patches import PatchDistance
from engine import cli
from engine.mar import mar_host
from tests.support.runs import write_run
from util import report
from util.shapes import HELD_OUT_START, render

COUNT = 60
FIRST = HELD_OUT_START + 50000  # not among those of the reference


def test_noise_and_seams_are_further_from_real_pictures(one_thread, tmp_path):
    pictures = [render(FIRST + i) for i in range(COUNT)]
    torn = [np.concatenate([x[:, :32], np.roll(x[:, 32:], 4, axis=0)], axis=1) for x in pictures]
    runs = {
        name: report.load_run(
            write_run(tmp_path / name, images, {"class_num": 6}, {"method": name})
        )
        for name, images in (("real", pictures), ("torn", torn))
    }
    host = mar_host(cli.named("mar_tiny").host())
    tokenizer = host.load(torch.device("cpu")).tokenizer
    distance = PatchDistance(tokenizer, host.tokenizer.scale(tokenizer), runs["real"])
    same, other = distance.compare(runs["real"]), distance.compare(runs["torn"])
    assert (same.difference, same.low, same.high) == pytest.approx((0, 0, 0))
    assert other.base == same.fid
    assert 0 < other.low < other.difference < other.high
    distance.labels = None
    over_classes = distance.compare(runs["torn"])
    assert (over_classes.low, over_classes.high) != (other.low, other.high)
