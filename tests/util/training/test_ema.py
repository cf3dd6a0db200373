"""EMA: the average of the weights that evaluation uses."""

import pytest
import torch
from torch import nn

from util.training.ema import EMA


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def step(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def test_each_update_is_rate_times_average_plus_the_rest_of_the_weight(model):
    ema = EMA(model, rate=0.9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(5):
        step(model)
        ema.update(model)
        expected = {n: 0.9 * expected[n] + 0.1 * p for n, p in model.named_parameters()}
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, expected[name])
        assert not torch.equal(average, dict(model.named_parameters())[name])


def test_averages_are_found_by_name_whatever_their_order(model):
    ema, other = EMA(model, 0.5), EMA(model, 0.5)
    step(model)
    ema.update(model)
    other.load_state_dict(dict(reversed(ema.state_dict().items())))
    for name, average in ema.state_dict().items():
        assert torch.equal(average, other.state_dict()[name])


def test_a_missing_average_is_an_error(model):
    ema = EMA(model, 0.5)
    weights = dict(ema.state_dict())
    del weights["0.bias"]
    with pytest.raises(KeyError, match=r"0\.bias"):
        ema.load_state_dict(weights)


def test_the_model_has_the_averages_inside_the_block_alone(model):
    ema = EMA(model, 0.5)
    x = torch.randn(2, 3)
    with torch.no_grad():
        averaged = model(x)
        step(model)
        trained = model(x)
        with ema.swapped_into(model):
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), trained)


def test_an_error_inside_the_block_restores_the_weights(model):
    ema = EMA(model, 0.5)
    step(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped_into(model):
        raise RuntimeError
    assert torch.equal(model[0].weight, before)
