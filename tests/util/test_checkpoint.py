"""Training checkpoints: what they hold, and that a failed write loses nothing."""

import resource

import pytest
import torch
from torch import nn

from tests.support.checkpoints import Run
from util.errors import UserError
from util.weights import LAST, load_state_dict_file, read_pickle, save_safetensors

OFFICIAL = {"model", "model_ema", "optimizer", "epoch", "scaler", "args"}


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def save(run, tmp_path):
    """Takes a step and saves a checkpoint; returns its path."""

    def call():
        run.step()
        run.save(tmp_path / LAST, {"step": 7}, lr=None, model="mar_tiny")
        return tmp_path / LAST

    return call


def test_a_checkpoint_has_the_official_keys_and_an_epoch_that_counts_from_zero(save, run):
    content = torch.load(save(), weights_only=True)
    assert content.keys() == OFFICIAL | {"progress"}
    assert content["epoch"] == 2
    assert content["args"].model == "mar_tiny"
    assert content["model"].keys() == content["model_ema"].keys() == run.model.state_dict().keys()


def test_the_original_trainer_can_resume_from_it(save, run):
    content = read_pickle(save())
    nn.Linear(3, 2).load_state_dict(content["model"])
    torch.optim.AdamW(run.model.parameters()).load_state_dict(content["optimizer"])
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])


def test_a_directory_may_hold_safetensors(tmp_path, run):
    save_safetensors(tmp_path / "model.safetensors", run.model.state_dict())
    assert torch.equal(load_state_dict_file(tmp_path)["bias"], run.model.bias)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(save, share):
    path = save()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="truncated"):
        load_state_dict_file(path.parent)


def test_a_missing_file_is_named_with_its_path(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_state_dict_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"neither checkpoint-last\.pth nor model\.safetensors"):
        load_state_dict_file(tmp_path)


def test_a_disk_that_fills_up_loses_only_the_new_file(save):
    path = save()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # torch's own write fails
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint-last\.pth .*free space"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    save()
    assert path.read_bytes() != before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_safetensors(tmp_path / "file" / "x.safetensors", run.model.state_dict())
