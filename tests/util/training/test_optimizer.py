"""Learning rate schedule and the groups with and without weight decay."""

import pytest
import torch
from torch import nn

from util.errors import UserError
from util.training.optimizer import LRSchedule, make_optimizer, parameter_groups, scaled_lr


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Parameter(torch.zeros(1, 4, 3))
        self.diffloss = nn.Linear(3, 3)


def test_warm_up_is_linear_in_the_fractional_epoch():
    schedule = LRSchedule(peak=2.0, warmup_epochs=4, epochs=10)
    assert [schedule.at(e) for e in (0, 1, 2.5, 4)] == [0.0, 0.5, 1.25, 2.0]


def test_constant_stays_at_the_peak_and_cosine_falls_to_the_minimum():
    constant = LRSchedule(peak=2.0, warmup_epochs=4, epochs=10)
    cosine = LRSchedule(peak=2.0, minimum=0.5, warmup_epochs=4, epochs=10, shape="cosine")
    assert constant.at(9.9) == 2.0
    assert cosine.at(4) == 2.0
    assert cosine.at(7) == pytest.approx(1.25)
    assert cosine.at(10) == pytest.approx(0.5)
    assert cosine.at(11) == pytest.approx(0.5)


def test_a_cosine_that_would_rise_is_refused_and_a_constant_rate_does_not_ask():
    with pytest.raises(UserError, match="--min_lr 0.01 is above the peak learning rate 0.001"):
        LRSchedule(1e-3, minimum=1e-2, shape="cosine")
    assert LRSchedule(1e-3, minimum=1e-2).at(200) == 1e-3
    assert LRSchedule(1e-3, minimum=1e-3, shape="cosine").at(250) == pytest.approx(1e-3)


def test_no_warm_up_starts_at_the_peak():
    assert LRSchedule(peak=2.0, warmup_epochs=0, epochs=10).at(0) == 2.0


def test_the_base_rate_scales_with_the_images_of_a_step_unless_a_rate_is_given():
    assert scaled_lr(None, 1e-4, 2048) == pytest.approx(8e-4)
    assert scaled_lr(3e-4, 1e-4, 2048) == 3e-4


def test_vectors_and_the_whole_head_have_no_weight_decay_and_come_first():
    model = Model()
    no_decay, decay = parameter_groups(model, 0.02)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.02)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in decay["params"]] == ["table", "body.weight"]
    others = {"body.bias", "norm.weight", "norm.bias", "diffloss.weight", "diffloss.bias"}
    assert {names[id(p)] for p in no_decay["params"]} == others


def test_the_optimizer_has_the_betas_of_mar():
    optimizer = make_optimizer(Model(), 1e-3, 0.02)
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.95)] * 2
