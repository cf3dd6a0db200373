"""The one reader of weights: what people really have is loaded, everything else is one sentence."""

import argparse
import io
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel

from models.detok import DeTok
from models.vae import AutoencoderKL
from tests.support.assertions import refusal
from tests.support.golden_detok import config, detok_mar, mar_config, tokenizer, weights
from util.errors import UserError
from util.weights import load_into, load_state_dict_file, save_safetensors

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


@pytest.fixture
def model() -> Net:
    return net(0)


PLAIN, AVERAGED = net(1).state_dict(), net(2).state_dict()


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def loads(model: nn.Module, content: object, path: pathlib.Path, use_ema: bool | None) -> dict:
    torch.save(content, path / "x.pth")
    load_into(model, path / "x.pth", use_ema)
    return model.state_dict()


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed_from_every_form_of_file(model, tmp_path, prefix):
    bare, averaged = prefixed(PLAIN, prefix), prefixed(AVERAGED, prefix)
    assert same(loads(model, bare, tmp_path, True), PLAIN)
    both = {"model": bare, "model_ema": averaged, "epoch": 3}
    assert same(loads(model, both, tmp_path, True), AVERAGED)
    assert same(loads(model, both, tmp_path, False), PLAIN)
    save_safetensors(tmp_path / "x.safetensors", bare)
    load_into(model, tmp_path / "x.safetensors")
    assert same(model.state_dict(), PLAIN)


def test_the_prefix_of_a_model_compiled_in_part_is_removed(model, tmp_path):
    compiled = {name.replace("first.", "first._orig_mod."): w for name, w in PLAIN.items()}
    assert same(loads(model, compiled, tmp_path, True), PLAIN)


def test_what_the_wrappers_themselves_write_is_loaded(model, tmp_path):
    wrapped = nn.DataParallel(torch.compile(net(1)))
    assert same(loads(model, wrapped.state_dict(), tmp_path, True), PLAIN)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
def test_what_torchs_averaged_model_writes_is_loaded(model, tmp_path, wrap):
    averages = AveragedModel(wrap(net(2))).state_dict()
    assert "n_averaged" in averages
    assert same(loads(model, averages, tmp_path, True), AVERAGED)
    both = {"model": PLAIN, "model_ema": averages}  # as torchvision's references write it
    assert same(loads(model, both, tmp_path, True), AVERAGED)
    assert same(loads(model, both, tmp_path, False), PLAIN)


CONTAINERS = {
    "bare": (PLAIN, True, PLAIN),
    "averages alone": ({"model_ema": AVERAGED}, True, AVERAGED),
    "averages and no weights": ({"model_ema": AVERAGED, "model": None}, True, AVERAGED),
    "weights alone, asked for": ({"model": PLAIN}, False, PLAIN),
    "whichever there is: averages": ({"model": PLAIN, "model_ema": AVERAGED}, None, AVERAGED),
    "whichever there is: weights": ({"model": PLAIN, "optimizer": {}}, None, PLAIN),
    "DeepSpeed": ({"module": PLAIN, "epoch": 3}, False, PLAIN),
    "DeepSpeed, averages wanted": ({"module": PLAIN, "epoch": 3}, True, PLAIN),
    "Lightning": ({"state_dict": PLAIN, "global_step": 7}, False, PLAIN),
    "DiT": ({"model": PLAIN, "ema": AVERAGED, "opt": {}}, True, AVERAGED),
    "DiT, weights asked for": ({"model": PLAIN, "ema": AVERAGED}, False, PLAIN),
    "timm": ({"state_dict": PLAIN, "state_dict_ema": AVERAGED, "epoch": 3}, True, AVERAGED),
    "timm, weights asked for": ({"state_dict": PLAIN, "state_dict_ema": AVERAGED}, False, PLAIN),
    "timm without averages": ({"state_dict": PLAIN, "state_dict_ema": None}, True, PLAIN),
    "tutorials": ({"epoch": 3, "model_state_dict": PLAIN, "loss": 0.5}, True, PLAIN),
    "arrays of numpy": ({name: w.numpy() for name, w in PLAIN.items()}, True, PLAIN),
    "flags": ({"model": PLAIN, "args": argparse.Namespace(lr=None)}, False, PLAIN),
    "parameters": (dict(net(1).named_parameters()), True, PLAIN),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_the_usual_containers_are_opened(model, tmp_path, case):
    content, use_ema, expected = CONTAINERS[case]
    assert same(loads(model, content, tmp_path, use_ema), expected)


SCALARS = [np.int64(3), np.float32(0.5), np.float64(0.1), np.bool_(True)]
SCALARS += [np.str_("adam"), np.uint8(7)]


@pytest.mark.parametrize(
    "value", [*SCALARS, np.arange(3), np.random.get_state()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("zipped", [True, False])
def test_numpys_scalars_and_arrays_do_not_stop_a_checkpoint(model, tmp_path, value, zipped):
    content = {"model_ema": AVERAGED, "epoch": value}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    load_into(model, tmp_path / "x.pth")
    assert same(model.state_dict(), AVERAGED)


def test_a_scalar_that_the_other_numpy_wrote_is_read(model, tmp_path):
    content = {"model_ema": AVERAGED, "epoch": np.int64(3)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pth").read_bytes()
    here = np.int64(0).__reduce__()[0].__module__.encode()
    there = b"numpy.core.multiarray" if b"_core" in here else b"numpy._core.multiarray"
    assert here in data
    (tmp_path / "x.pth").write_bytes(data.replace(here, there))
    load_into(model, tmp_path / "x.pth")
    assert same(model.state_dict(), AVERAGED)


REFUSED = {
    "weights alone": ({"model": PLAIN}, True, "no averaged weights .*--no_ema"),
    "averages None": ({"model": PLAIN, "model_ema": None}, True, "no averaged weights"),
    "averages alone": ({"model_ema": AVERAGED}, False, "alone: remove --no_ema"),
    "a path": (
        {"model_ema": AVERAGED, "args": pathlib.PurePosixPath("a")},
        True,
        r"holds pathlib\.\S+",
    ),
    "a whole module": (nn.Linear(2, 2), True, r"holds torch\.nn\S+.*state_dict\(\)"),
    "numbers": ({"model": {"weight": 3}}, False, "'weight' is a int"),
    "numbered": ({0: torch.zeros(2)}, True, "'0' is a Tensor"),
    "empty": ({"model": {}}, False, "no weights by name"),
    "half prefixed": (
        {**prefixed(PLAIN, "module."), "first.bias": torch.zeros(2)},
        True,
        r"as 'module\.\*' beside others",
    ),
    "one of another model": (
        {**prefixed(PLAIN, "module."), "module.first.bias": torch.zeros(3)},
        True,
        r"'first\.bias' is \(3,\)",
    ),
    "one lost": (
        {"net.first.bias": PLAIN["first.bias"], **net(1).second.state_dict()},
        True,
        "lacks",
    ),
    "twice": (
        {**PLAIN, "_orig_mod.first.bias": torch.zeros(2)},
        True,
        r"a surplus '_orig_mod\.first\.bias'",
    ),
    "a part of a larger model": (
        {**prefixed(PLAIN, "net."), "loss.weight": torch.zeros(2)},
        True,
        r"the weights of the model as 'net\.\*' beside others: save that part alone",
    ),
    "quantised": (
        {name: tensor.to(torch.int8) for name, tensor in PLAIN.items()},
        True,
        r"is int8 in \S+: quantised weights",
    ),
    "short list": ({"model_ema": list(AVERAGED.values())[:3]}, True, "list of 3 without names"),
    "list of numbers": ({"model_ema": [1, 2, 3, 4]}, True, "list of 4 without names"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence_that_names_it(model, tmp_path, case):
    content, use_ema, words = REFUSED[case]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as caught:
        loads(model, content, tmp_path, use_ema)
    assert "\n" not in str(caught.value)
    assert same(model.state_dict(), before)


class Code:
    """What an attacker would put into a pickle."""

    def __reduce__(self):
        return os.system, ("false",)


def bytes_of(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def write_zip(buffer) -> None:
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "no weights here")


FOREIGN = {
    "nothing": (b"", "is empty"),
    "a web page": (b"\n<!DOCTYPE html><p>Sign in", "HTML page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "`git lfs pull`"),
    "text": (b"hello world", "not a PyTorch file"),
    "zip": (bytes_of(write_zip), "not a PyTorch file"),
    "code": (bytes_of(lambda buffer: torch.save({"model": Code()}, buffer)), "read safely"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(range(60)), "not a PyTorch file"),
    "safetensors": (save({"first.bias": torch.zeros(2)}), "not a PyTorch file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_kind_is_refused_as_what_it_is(tmp_path, kind):
    content, words = FOREIGN[kind]
    (tmp_path / "x.pth").write_bytes(content)
    assert words in refusal(lambda: load_state_dict_file(tmp_path / "x.pth"))


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind != "safetensors"])
def test_a_file_of_another_kind_is_no_safetensors_file(tmp_path, kind):
    content, words = FOREIGN[kind]
    (tmp_path / "x.safetensors").write_bytes(content)
    words = words if kind in ("nothing", "a web page", "a pointer") else "not a safetensors file"
    assert words in refusal(lambda: load_state_dict_file(tmp_path / "x.safetensors"))


# ---- averages as a list --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["l-DeTok's", "ours"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_a_list_of_averages_gets_the_names_of_its_order(tmp_path, order, with_weights):
    theirs = weights("mar")
    names = list(theirs) if order == "l-DeTok's" else list(detok_mar().state_dict())
    assert list(theirs) != list(detok_mar().state_dict())
    content = {"model_ema": [theirs[name] for name in names]}
    if with_weights:
        content["model"] = {name: torch.zeros_like(theirs[name]) for name in names}
    model = type(detok_mar())(**mar_config())
    assert same(loads(model, content, tmp_path, True), detok_mar().state_dict())


def test_a_list_of_the_tokenizers_averages_is_named_too(tmp_path):
    model = DeTok(**config("tok_config"))
    content = {"model_ema": list(weights("tok").values())}
    assert same(loads(model, content, tmp_path, None), tokenizer().state_dict())


def test_without_a_model_a_list_is_refused(tmp_path):
    torch.save({"model_ema": list(AVERAGED.values())}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="without names"):
        load_state_dict_file(tmp_path / "x.pth")


# ---- tokenizers ----------------------------------------------------------------------------------------


def test_what_a_tokenizers_training_adds_is_left_out(tmp_path):
    small = {"embed_dim": 4, "ch_mult": (1, 2), "ch": 32, "num_res_blocks": 1}
    vae = AutoencoderKL(**small)
    state = {**vae.state_dict(), "loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": prefixed(state, "module.")}, tmp_path / "kl.ckpt")
    assert same(
        AutoencoderKL(**small, ckpt_path=tmp_path / "kl.ckpt").state_dict(), vae.state_dict()
    )


def test_importing_the_models_lets_torchs_safe_loader_read_the_flags_of_official_files(tmp_path):
    content = {"model_ema": PLAIN, "args": argparse.Namespace(lr=None), "epoch": 3}
    torch.save(content, tmp_path / "x.pth")
    load = f"import torch; torch.load({str(tmp_path / 'x.pth')!r}, weights_only=True)['model_ema']"
    with_ours = ["from models import mar", "import models.vae"]
    for first in with_ours:
        subprocess.run([sys.executable, "-c", f"{first}; {load}"], check=True)
    alone = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert "argparse.Namespace" in alone.stderr
