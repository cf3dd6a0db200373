"""Code that was written for the original runs unchanged: its notebook, with files of its format."""

import argparse
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch

from models import mar, vae
from models.vae import AutoencoderKL
from tests.support.train_small import WIDTHS
from util.weights import read_pickle

KL16 = {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4)}


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A folder with small files where the notebook looks for the official ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mar.SIZES, "mar_base", WIDTHS)
    monkeypatch.setattr(vae, "AutoencoderKL", partial(AutoencoderKL, ch=32, num_res_blocks=1))
    torch.manual_seed(0)
    model = mar.mar_base(buffer_size=64, diffloss_d=2, diffloss_w=32, num_sampling_steps="5")
    folder = tmp_path / "pretrained_models"
    for name in ("mar/mar_base", "vae"):
        (folder / name).mkdir(parents=True)
    content = {
        "model": {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()},
        "model_ema": model.state_dict(),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "epoch": 399,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mar_base", lr=None, betas=(0.9, 0.95)),
    }
    torch.save(content, folder / "mar" / "mar_base" / "checkpoint-last.pth")
    torch.save({"model": vae.AutoencoderKL(**KL16).state_dict()}, folder / "vae" / "kl16.ckpt")
    return model


def test_the_notebook_samples_and_decodes(official):
    model_type, class_labels = "mar_base", (207, 360)
    model = mar.__dict__[model_type](
        buffer_size=64, diffloss_d=2, diffloss_w=32, num_sampling_steps="5"
    )
    state_dict = torch.load(f"pretrained_models/mar/{model_type}/checkpoint-last.pth")["model_ema"]
    model.load_state_dict(state_dict)
    model.eval()
    assert all(torch.equal(state_dict[key], v) for key, v in official.state_dict().items())
    kl16 = vae.AutoencoderKL(
        embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ckpt_path="pretrained_models/vae/kl16.ckpt"
    ).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sampled_tokens = model.sample_tokens(
            bsz=len(class_labels),
            num_iter=2,
            cfg=4.0,
            cfg_schedule="constant",
            labels=torch.Tensor(class_labels).long(),
            temperature=1.0,
            progress=True,
        )
        sampled_images = kl16.decode(sampled_tokens / 0.2325)
    assert sampled_tokens.shape == (2, model.token_embed_dim, model.seq_h, model.seq_w)
    assert sampled_images.shape == (2, 3, 256, 256)
    assert sampled_images.isfinite().all()
    assert not torch.equal(sampled_images[0], sampled_images[1])


def test_our_own_reader_leaves_what_torch_may_unpickle_as_it_was(official):
    before = set(torch.serialization.get_safe_globals())  # torch keeps them in no order
    assert argparse.Namespace in before
    read_pickle(Path("pretrained_models/mar/mar_base/checkpoint-last.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [("mar_base", 6, 1024), ("mar_large", 8, 1280), ("mar_huge", 12, 1536)],
)
def test_models_have_the_attributes_of_the_original(name, depth, width):
    with torch.device("meta"):
        model = mar.__dict__[name](
            buffer_size=64, diffloss_d=depth, diffloss_w=width, num_sampling_steps="100"
        )
    assert (model.buffer_size, model.seq_len, model.seq_h, model.seq_w) == (64, 256, 16, 16)
    assert (model.token_embed_dim, model.vae_embed_dim, model.patch_size) == (16, 16, 1)
    assert model.diffloss.num_sampling_steps == 100


def test_kl16_is_built_as_in_the_notebook():
    positional = ["embed_dim", "ch_mult", "use_variational", "ckpt_path"]
    parameters = inspect.signature(AutoencoderKL).parameters
    assert list(parameters)[:4] == positional
    assert (parameters["use_variational"].default, parameters["ckpt_path"].default) == (True, None)
    with torch.device("meta"):
        kl16 = AutoencoderKL(**KL16, ckpt_path=None)
    assert round(sum(p.numel() for p in kl16.parameters()) / 1e6, 1) == 66.5
