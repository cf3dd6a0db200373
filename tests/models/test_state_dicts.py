"""Names and shapes of the weights are those of the published checkpoints, whatever the options."""

import argparse

import pytest
import torch

from engine.mar import PRESETS
from models import mar
from models.mar_config import MARConfig
from tests.support.golden_recipe import load_shapes
from util import checkpoint
from util.training.ema import EMA
from util.training.optimizer import make_optimizer
from util.weights import read_pickle

NAMES = ("mar_base", "mar_large", "mar_huge")
TRAINING_OPTIONS = {"aux_weight": 0.5, "masked_keep": 0.4, "pos_init": "sincos"}


def build(name: str, **kwargs: object) -> mar.MAR:
    """A model without memory for its weights, by its factory."""
    with torch.device("meta"):
        return getattr(mar, name)(**kwargs)


def head_of(name: str) -> dict[str, int]:
    """Those of mar_huge are the command's own default."""
    huge = {"diffloss_d": 12, "diffloss_w": 1536}
    return {key: PRESETS[name].get(key, huge[key]) for key in huge}


def shapes(model: mar.MAR) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_those_of_the_published_checkpoint(name):
    assert shapes(build(name, **head_of(name))) == load_shapes(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_checkpoint_has_the_official_names_in_that_order(name, tmp_path):
    model, published = build(name, **head_of(name)), load_shapes(name)
    optimizer = make_optimizer(model, 1e-4, 0.02)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    checkpoint.save_checkpoint(
        tmp_path / "x.pth",
        model=model,
        ema=EMA(model, 0.9999),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        epochs_done=1,
        args=argparse.Namespace(),
        progress={},
    )
    content = read_pickle(tmp_path / "x.pth")
    assert set(content) - {"progress"} == {
        *("model", "model_ema", "optimizer", "epoch", "scaler", "args")
    }
    for key in ("model", "model_ema"):
        assert {k: tuple(tensor.shape) for k, tensor in content[key].items()} == published
    # MAR's trainer numbers the parameters without weight decay first
    plain = [k for k, shape in published.items() if len(shape) == 1 or "diffloss" in k]
    order = [*plain, *(k for k in published if k not in set(plain))]
    groups, state = (content["optimizer"][key] for key in ("param_groups", "state"))
    assert [group["weight_decay"] for group in groups] == [0.0, 0.02]
    assert [len(group["params"]) for group in groups] == [len(plain), len(order) - len(plain)]
    numbers = [number for group in groups for number in group["params"]]
    assert numbers == list(range(len(order)))
    for number, k in zip(numbers, order, strict=True):
        assert tuple(state[number]["exp_avg"].shape) == published[k]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_head_the_factories_take_that_of_the_original_constructor(name):
    ours, published = shapes(build(name)), load_shapes(name)
    assert len(build(name).diffloss.net.res_blocks) == 3
    assert ours["diffloss.net.input_proj.weight"] == (1024, 16)
    trunk = {key: shape for key, shape in published.items() if not key.startswith("diffloss.")}
    assert {key: ours[key] for key in trunk} == trunk


def test_every_tensor_of_a_checkpoint_is_trained():
    model = build("mar_tiny")
    assert dict(model.named_parameters()).keys() == model.state_dict().keys()


def test_mar_tiny_has_the_geometry_of_its_preset():
    model, preset = build("mar_tiny"), MARConfig(**mar.SIZES["mar_tiny"], **mar.TINY)
    assert (len(model.encoder_blocks), len(model.decoder_blocks)) == (
        preset.encoder_depth,
        preset.decoder_depth,
    )
    own, width, tokens = shapes(model), preset.encoder_embed_dim, preset.grid_size**2
    assert own["class_emb.weight"] == (preset.class_num, width)
    assert own["encoder_pos_embed_learned"] == (1, preset.buffer_size + tokens, width)
    assert own["diffusion_pos_embed_learned"] == (1, tokens, width)
    assert own["z_proj.weight"] == (width, preset.token_dim)
    assert len(model.diffloss.net.res_blocks) == preset.diffloss_d
    assert own["diffloss.net.input_proj.weight"][0] == preset.diffloss_w
    assert model.diffloss.num_sampling_steps == int(preset.num_sampling_steps.removeprefix("ddim"))


def test_flags_win_over_the_geometry_of_mar_tiny():
    model = build("mar_tiny", buffer_size=3, class_num=4, diffloss_w=16)
    assert model.buffer_size == 3
    assert shapes(model)["class_emb.weight"][0] == 4
    assert shapes(model)["diffloss.net.input_proj.weight"][0] == 16


@pytest.mark.parametrize("option", TRAINING_OPTIONS)
@pytest.mark.parametrize("name", ["mar_tiny", "mar_base"])
def test_options_of_training_change_neither_names_nor_shapes(name, option):
    plain, changed = build(name), build(name, **{option: TRAINING_OPTIONS[option]})
    assert shapes(changed) == shapes(plain)
