"""Checkpoints: what is read, what is refused and in which words, what is written."""

import argparse
import os
import resource
import zipfile

import pytest
import torch
from torch import nn

from util.checkpoint import save_checkpoint
from util.errors import UserError
from util.training.ema import EMA
from util.weights import load_into, load_state_dict_file, read_pickle, save_safetensors

OFFICIAL = {"model", "model_ema", "optimizer", "epoch", "scaler", "args"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def save(model, tmp_path):
    """Takes a step and saves a checkpoint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def call():
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        save_checkpoint(
            tmp_path / "checkpoint-last.pth",
            model=model,
            ema=EMA(model, 0.9),
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            epochs_done=3,
            args=argparse.Namespace(lr=None, model="mar_tiny"),
            progress={"step": 7},
        )

    return call


@pytest.fixture
def saved(save, tmp_path):
    """The folder of a checkpoint."""
    save()
    return tmp_path


def test_a_checkpoint_has_the_official_keys_and_an_epoch_that_counts_from_zero(saved, model):
    content = torch.load(saved / "checkpoint-last.pth", weights_only=True)
    assert content.keys() == OFFICIAL | {"progress"}
    assert content["epoch"] == 2
    assert content["args"].model == "mar_tiny"
    assert content["model"].keys() == content["model_ema"].keys() == model.state_dict().keys()


def test_the_original_trainer_can_resume_from_it(saved, model):
    content = read_pickle(saved / "checkpoint-last.pth")
    nn.Linear(3, 2).load_state_dict(content["model"])
    torch.optim.AdamW(model.parameters()).load_state_dict(content["optimizer"])
    torch.amp.GradScaler("cpu").load_state_dict(content["scaler"])


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.ckpt", "a.safetensors"])
def test_bare_weights_are_read_from_every_kind_of_file(tmp_path, model, name):
    if name.endswith("safetensors"):
        save_safetensors(tmp_path / name, model.state_dict())
    else:
        torch.save(model.state_dict(), tmp_path / name)
    assert torch.equal(load_state_dict_file(tmp_path / name)["weight"], model.weight)


def test_a_directory_may_hold_safetensors(tmp_path, model):
    save_safetensors(tmp_path / "model.safetensors", model.state_dict())
    assert torch.equal(load_state_dict_file(tmp_path)["bias"], model.bias)


def write_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no weights here")


class Code:
    """What an attacker would put into a pickle."""

    def __reduce__(self):
        return os.system, ("false",)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><p>Sign in"), "HTML page"),
    "text": (lambda path: path.write_text("hello, this is text"), "not a PyTorch file"),
    "other zip": (write_zip, "truncated, damaged"),
    "code": (lambda path: torch.save({"model": Code()}, path), "read safely"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_in_one_sentence(tmp_path, kind):
    make, words = FOREIGN[kind]
    make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        load_state_dict_file(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    path = saved / "checkpoint-last.pth"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="truncated"):
        load_state_dict_file(saved)


@pytest.mark.parametrize("content", [b"<html>", b"hello", b"\x00" * 50])
def test_a_file_with_a_false_suffix_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors is"):
        load_state_dict_file(tmp_path / "x.safetensors")


def test_a_missing_file_is_named_with_its_path(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        load_state_dict_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"neither checkpoint-last\.pth nor model\.safetensors"):
        load_state_dict_file(tmp_path)


def test_the_first_wrong_name_or_shape_is_named_and_the_model_stays_as_it_was(tmp_path, model):
    before = model.weight.detach().clone()
    cases = {
        r"lacks 'bias'": {"weight": torch.zeros(2, 3)},
        r"'weight' is \(5, 3\).*\(2, 3\) in the model": {
            "weight": torch.zeros(5, 3),
            "bias": torch.zeros(2),
        },
        r"a surplus 'extra'": {
            "weight": torch.zeros(2, 3),
            "bias": torch.zeros(2),
            "extra": before,
        },
    }
    for words, weights in cases.items():
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(UserError, match=words):
            load_into(model, tmp_path / "x.pth")
    assert torch.equal(model.weight, before)


def test_a_disk_that_fills_up_loses_only_the_new_file(saved, save):
    before = (saved / "checkpoint-last.pth").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # torch's own write fails
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint-last\.pth .*free space"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (saved / "checkpoint-last.pth").read_bytes() == before
    assert [path.name for path in saved.iterdir()] == ["checkpoint-last.pth"]
    save()
    assert (saved / "checkpoint-last.pth").read_bytes() != before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_safetensors(tmp_path / "file" / "x.safetensors", model.state_dict())
