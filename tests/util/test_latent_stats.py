"""l-DeTok's statistics: their pickle becomes safetensors, and nothing else in it is ever run."""

import os
import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.detok import DeTok
from models.tokenizers import load_detok, load_tokenizer
from tests.support.assertions import refusal
from tests.support.golden_data import GOLDEN
from tests.support.golden_detok import recorded, tokenizer, weights
from util.checkpoint import main
from util.data.latent_stats import convert_statistics, read_statistics
from util.errors import UserError, run_main

EXAMPLE = GOLDEN / "detok_stats_example.pkl"
KEY = "detok-BB-gamm3.0-m0.7"


def channel(channels: int, offset: float = 0.0) -> dict:
    """An entry of their file, with other numbers for the log variances."""
    mean, std = torch.arange(2.0 * channels) + offset, torch.arange(1.0, 2 * channels + 1)
    return {"single": (mean.mean(), std.mean()), "channel": (mean, std)}


def write(content: object, path, protocol: int = pickle.DEFAULT_PROTOCOL):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    return path


def test_the_example_with_cuda_storages_is_converted(tmp_path):
    target = convert_statistics(EXAMPLE, tmp_path / "stats.safetensors")
    mean, std = read_statistics(target)
    assert torch.equal(mean, recorded()["latent_mean"])
    assert torch.equal(std, recorded()["latent_std"])


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("channels", [1, 5, 32])
def test_any_number_of_channels_in_every_pickle_protocol_of_python_3(tmp_path, channels, protocol):
    source = write({"a": channel(channels)}, tmp_path / "s.pkl", protocol)
    mean, std = read_statistics(convert_statistics(source, tmp_path / "s.safetensors"))
    assert mean.tolist() == list(range(channels))
    assert std.tolist() == list(range(1, channels + 1))


def test_of_several_statistics_the_user_chooses(tmp_path):
    content = OrderedDict(a=channel(4), b=channel(4, 100.0))
    source, target = write(content, tmp_path / "s.pkl"), tmp_path / "s.safetensors"
    with pytest.raises(UserError, match=r"statistics of a, b: choose one by --key"):
        convert_statistics(source, target)
    with pytest.raises(UserError, match=r"no statistics 'c': choose from a, b"):
        convert_statistics(source, target, "c")
    convert_statistics(source, target, "b")
    assert read_statistics(target)[0].tolist() == [100, 101, 102, 103]


class Code:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


class StorageCode(Code):
    """A storage whose bytes are themselves a pickle with code in it."""

    def __reduce__(self):
        inner = pickle.dumps(Code(self.marker))
        return torch.storage._load_from_bytes, (inner,)


FOREIGN = {
    "code": (lambda marker: {"a": Code(marker)}, r"holds (_?io|builtins)\.open"),
    "code in a storage": (lambda marker: {"a": StorageCode(marker)}, "damaged"),
    "a function": (lambda marker: {"a": os.getcwd}, r"holds (posix|nt)\.getcwd"),
    "a numpy array": (lambda marker: {"a": {"channel": (np.ones(4), np.ones(4))}}, "holds numpy"),
    "a module": (lambda marker: torch.nn.Linear(2, 2), "holds torch.nn"),
    "a number": (lambda marker: 3, "no latent statistics by name"),
    "nothing": (lambda marker: {}, "no latent statistics by name"),
    "no channels": (lambda marker: {"a": {"single": (0.0, 1.0)}}, "no pair of mean and std"),
    "one tensor": (lambda marker: {"a": torch.zeros(4)}, "no pair of mean and std"),
    "odd": (lambda marker: {"a": {"channel": (torch.zeros(5), torch.ones(5))}}, "2C entries"),
    "floats": (lambda marker: {"a": {"channel": (0.0, 1.0)}}, "2C entries"),
    "unequal": (lambda marker: {"a": {"channel": (torch.zeros(4), torch.ones(6))}}, "must be"),
    "NaN": (
        lambda marker: {"a": {"channel": (torch.full((4,), float("nan")), torch.ones(4))}},
        "finite",
    ),
    "no spread": (lambda marker: {"a": {"channel": (torch.zeros(4), torch.zeros(4))}}, "positive"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_pickle_is_one_sentence_and_its_code_never_runs(tmp_path, kind):
    make, words = FOREIGN[kind]
    marker = tmp_path / "ran"
    source = write(make(str(marker)), tmp_path / "s.pkl")
    with pytest.raises(UserError, match=words) as caught:
        convert_statistics(source, tmp_path / "s.safetensors")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "s.safetensors").exists()


CUT = [EXAMPLE.read_bytes()[:length] for length in (0, 1, 10, 200, 800, 1500, 1572)]


@pytest.mark.parametrize("content", [*CUT, b"<html>Sign in", b"PK\x03\x04 zip"], ids=range(9))
def test_a_truncated_pickle_and_another_kind_of_file_are_one_sentence(tmp_path, content):
    (tmp_path / "s.pkl").write_bytes(content)
    said = refusal(lambda: convert_statistics(tmp_path / "s.pkl", tmp_path / "s.safetensors"))
    assert "is damaged or no pickle" in said


def test_the_command_converts_and_overwrites_nothing_unasked(tmp_path, monkeypatch, capsys):
    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["checkpoint", "convert", str(EXAMPLE), *map(str, words)])
        run_main(main)

    target = tmp_path / "stats.safetensors"
    call(target)
    assert capsys.readouterr().out == f"wrote {target}\n"
    for words in ((target,), (tmp_path / "stats.pth",), (tmp_path / "b.safetensors", "--key", "x")):
        with pytest.raises(SystemExit) as exit_info:
            call(*words)
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    call(target, "--overwrite", "--key", KEY)


# ---- the tokenizer that reads them ---------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> tuple:
    """The golden tokenizer as l-DeTok's training writes it, and its statistics."""
    averaged = weights("tok")
    content = {
        "model": {name: torch.zeros_like(w) for name, w in averaged.items()},
        "model_ema": {**averaged, "loss.discriminator.weight": torch.zeros(2)},
        "optimizer": {},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "tok.pth")
    return tmp_path / "tok.pth", convert_statistics(EXAMPLE, tmp_path / "stats.safetensors")


def test_the_tokenizer_is_loaded_with_its_averages_and_statistics(files):
    loaded = load_detok(*files, heads=(3, 2))
    for name, tensor in tokenizer().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    images = (recorded()["image"] / 255 - 0.5) / 0.5
    torch.testing.assert_close(loaded.encode(images).mode(), recorded()["tok_out/latents"])


def test_the_size_is_read_from_the_file(tmp_path):
    torch.manual_seed(0)
    small = DeTok(32, 8, 4, *({"width": 512, "layers": n, "heads": 8} for n in (1, 2)))
    torch.save(small.state_dict(), tmp_path / "tok.pth")
    save_file({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "s.safetensors")
    loaded = load_tokenizer("detok", tmp_path / "tok.pth", 4, tmp_path / "s.safetensors")
    assert (loaded.img_size, loaded.stride, loaded.embed_dim) == (32, 8, 4)
    assert not any(p.requires_grad for p in loaded.parameters())
    small.set_statistics(0.0, 1.0)
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded.encode(x).mean, small.encode(x).mean)
    with pytest.raises(ValueError, match="latents of 4 channels, not of 16"):
        load_tokenizer("detok", tmp_path / "tok.pth", 16, tmp_path / "s.safetensors")


def test_files_that_do_not_fit_the_tokenizer_are_one_sentence(files, tmp_path):
    path, stats = files
    cases = [
        ((tmp_path / "none.pth", stats), "none.pth not found.*detok_tokenizer"),
        (
            (path, tmp_path / "none.safetensors"),
            "no latent statistics at .*util.checkpoint convert",
        ),
        ((path, EXAMPLE), "not a safetensors file: convert it"),
        ((path, path), "not a safetensors file: convert it"),
        ((stats, stats), "not a file of l-DeTok's tokenizer"),
    ]
    for arguments, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_detok(*arguments, heads=(3, 2))
    with pytest.raises(ValueError, match="encoder has width 48; l-DeTok's widths are 512, 768"):
        load_detok(path, stats)
    save_file({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "s4.safetensors")
    with pytest.raises(ValueError, match="statistics of 4 channels, but the latents of .* have 16"):
        load_detok(path, tmp_path / "s4.safetensors", heads=(3, 2))
    with pytest.raises(ValueError, match="stats_path"):
        load_tokenizer("detok", path, 16)
