"""Training of the bundled GPT: stopped and started again it is the same, and codes are of its tokenizer."""

from functools import partial

import pytest
import torch
from safetensors.torch import save

from tests.support import ROOT
from tests.support.assertions import assert_same, refusal
from util.errors import UserError
from util.tiny import gpt as tiny_gpt
from util.tiny.training import load_checkpoint, save_checkpoint
from util.weights import read_pickle

PICTURES = 8  # codes of as many


@pytest.fixture
def codes_of(monkeypatch, write_codes):
    """Writes codes of the bundled tokenizer, or of another, into a folder; small steps."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tiny_gpt, "BATCH", 2)
    return partial(write_codes, tokenizer=tiny_gpt.TOKENIZER)


def test_a_stopped_training_continues_to_the_same_weights(codes_of, tmp_path, killed_at_step_2):
    whole, loss = tiny_gpt.train(codes_of(tmp_path / "one"), 3, PICTURES)
    folder = codes_of(tmp_path / "two")
    resumed, again = killed_at_step_2(tiny_gpt, lambda: tiny_gpt.train(folder, 3, PICTURES))
    assert again == loss
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_codes_of_another_tokenizer_and_too_few_of_them_are_refused(codes_of, tmp_path):
    with pytest.raises(UserError, match="has codes of another tokenizer"):
        tiny_gpt.load_codes(codes_of(tmp_path / "old", digest="0"), PICTURES)
    with pytest.raises(UserError, match="has codes of 8 pictures, not 9"):
        tiny_gpt.load_codes(codes_of(tmp_path / "few"), PICTURES + 1)


@pytest.mark.parametrize("content", [b"", b"x" * 99, save({"other": torch.zeros(9)})], ids=range(3))
def test_codes_that_are_damaged_are_named(codes_of, tmp_path, content):
    (tmp_path / "codes.safetensors").write_bytes(content)
    assert "codes.safetensors" in refusal(lambda: tiny_gpt.load_codes(tmp_path, PICTURES))


@pytest.mark.parametrize("fault", ["empty", "model", "optimizer", "step", "another model's"])
def test_a_checkpoint_that_is_damaged_is_named(tmp_path, fault):
    path, model = tmp_path / "checkpoint.pth", torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(path, model, optimizer, step=3)
    assert load_checkpoint(path, model, optimizer, "step") == {"step": 3}
    content = read_pickle(path, mmap=False)
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "another model's":
        model = torch.nn.Linear(3, 2)
    else:
        del content[fault]
        torch.save(content, path)
    assert str(path) in refusal(lambda: load_checkpoint(path, model, optimizer, "step"))


def test_codes_are_made_once_and_kept(codes_of, tmp_path):
    tmp_path.joinpath("new").mkdir()
    made = tiny_gpt.load_codes(tmp_path / "new", 2)
    assert made.shape == (2, 256)
    assert torch.equal(tiny_gpt.load_codes(tmp_path / "new", 2), made)
