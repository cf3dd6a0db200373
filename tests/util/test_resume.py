"""Resuming from a checkpoint with a missing, empty or foreign entry is one sentence that names it."""

import copy

import numpy as np
import pytest
import torch

from tests.support.checkpoints import Run
from util import checkpoint
from util.errors import UserError
from util.weights import LAST, read_pickle

PROGRESS = {"step_in_epoch": 1, "step": 7, "images_per_step": 4, "images": 12, "skipped": 0}


@pytest.fixture
def content(tmp_path) -> dict:
    """What a run wrote after some steps; restore() reads it back from a file."""
    run = Run()
    run.step()
    run.save(tmp_path / LAST, PROGRESS)
    return copy.deepcopy(read_pickle(tmp_path / LAST))


def restore(content: object, folder, fp16: bool = False) -> tuple[Run, int, dict]:
    torch.save(content, folder / "x.pth")
    run = Run(seed=1, fp16=fp16)
    return run, *checkpoint.restore_checkpoint(folder / "x.pth", **run.parts())


def test_a_whole_checkpoint_comes_back(content, tmp_path):
    run, epochs, progress = restore(content, tmp_path)
    assert (epochs, progress) == (3, PROGRESS)
    assert torch.equal(run.model.weight, content["model"]["weight"])
    moments = run.optimizer.state[run.model.weight]["exp_avg"]
    assert torch.equal(moments, content["optimizer"]["state"][0]["exp_avg"])


def test_prefixes_numpy_numbers_and_a_list_of_averages_do_not_stop_a_resumption(content, tmp_path):
    content["model"] = {f"module.{name}": w for name, w in content["model"].items()}
    content["model_ema"] = list(content["model_ema"].values())
    content["epoch"] = torch.tensor(2)
    content["progress"] = {name: np.int32(value) for name, value in PROGRESS.items()}
    run, epochs, progress = restore(content, tmp_path)
    assert (epochs, progress) == (3, PROGRESS)
    assert type(progress["step"]) is int
    assert torch.equal(run.ema.averages[0], content["model_ema"][0])


def test_a_checkpoint_of_the_original_has_no_progress(content, tmp_path):
    del content["progress"]
    assert restore(content, tmp_path)[1:] == (3, {})


def test_options_that_an_older_torch_did_not_know_keep_their_defaults(content, tmp_path):
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    (group,) = content["optimizer"]["param_groups"]
    content["optimizer"]["param_groups"] = [{name: group[name] for name in known}]
    run, epochs, _ = restore(content, tmp_path)
    assert epochs == 3
    assert run.optimizer.param_groups[0].keys() == Run().optimizer.param_groups[0].keys()


def test_before_the_first_step_there_are_no_moments(content, tmp_path):
    content["optimizer"]["state"] = {}
    content |= {"epoch": -1, "progress": {**PROGRESS, "step": 0}}
    assert restore(content, tmp_path)[1] == 0


def drop(*keys: object):
    """Removes content[keys[0]][keys[1]]..."""

    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value: object, *keys: object):
    def change(content: dict) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


FAULTS = {
    **{f"{key} None": (put(None, key), f"its '{key}' is None") for key in (
        "model", "model_ema", "optimizer", "epoch", "progress",
    )},
    **{f"no {key}": (drop(key), f"has no '{key}'") for key in (
        "model", "model_ema", "optimizer", "epoch",
    )},
    "epoch a word": (put("3", "epoch"), "its 'epoch' is a str"),
    "epoch a float": (put(2.0, "epoch"), "its 'epoch' is a float"),
    "epoch below the first": (put(-2, "epoch"), "its 'epoch' is -2"),
    "progress below zero": (put(-1, "progress", "step"), "has -1 as 'step'"),
    "model empty": (put({}, "model"), "no weights by name"),
    "model partial": (drop("model", "bias"), "lacks 'bias'"),
    "averages partial": (drop("model_ema", "bias"), "lacks 'bias'"),
    "averages short": (put([torch.zeros(2, 3)], "model_ema"), "list of 1"),
    "optimizer empty": (put({}, "optimizer"), "its 'optimizer' is incomplete"),
    "optimizer a list": (put([], "optimizer"), "its 'optimizer' is a list"),
    "groups missing": (drop("optimizer", "param_groups"), "its 'optimizer' is incomplete"),
    "groups None": (put(None, "optimizer", "param_groups"), "its 'optimizer' is incomplete"),
    "state missing": (drop("optimizer", "state"), "its 'optimizer' is incomplete"),
    "state None": (put(None, "optimizer", "state"), "its 'optimizer' is incomplete"),
    "state empty": (put({}, "optimizer", "state"), "moments of 0 of 2 parameters"),
    "no learning rate": (drop("optimizer", "param_groups", 0, "lr"), "lacks 'lr'"),
    **{f"{name} None": (put(None, "optimizer", "param_groups", 0, name), f"lacks '{name}'") for name in (
        "lr", "betas", "eps", "weight_decay", "amsgrad",
    )},
    "moments of one": (drop("optimizer", "state", 1), "moments of 1 of 2 parameters"),
    "half the moments": (drop("optimizer", "state", 0, "exp_avg_sq"), "moments of 1 of 2"),
    "no steps": (drop("optimizer", "state", 0, "step"), "its 'optimizer' is incomplete"),
    "moments None": (put(None, "optimizer", "state", 0), "its 'optimizer' is incomplete"),
    "moments of another": (
        put(torch.zeros(5), "optimizer", "state", 0, "exp_avg"), "moments of 1 of 2",
    ),
    "progress a list": (put([1], "progress"), "its 'progress' is a list"),
    "progress a word": (put("7", "progress", "step"), "has a str as 'step'"),
    **{f"progress without {key}": (drop("progress", key), f"'progress' lacks '{key}'") for key in (
        "step", "step_in_epoch", "images_per_step",
    )},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_entry_that_is_missing_or_broken_is_named(content, tmp_path, fault):
    change, words = FAULTS[fault]
    change(content)
    with pytest.raises(UserError, match=words) as caught:
        restore(content, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaler", [{"scale": 2.0}, [1], "x"])
def test_a_broken_scaler_is_named_where_it_is_needed(content, tmp_path, scaler):
    content["scaler"] = scaler
    restore(content, tmp_path)
    with pytest.raises(UserError, match="its 'scaler' is incomplete"):
        restore(content, tmp_path, fp16=True)
