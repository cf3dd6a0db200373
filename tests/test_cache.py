"""main_cache.py: latents on disk, and training from pictures and from their latents."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import main_cache
import main_mar
from models import mar
from models.linear_tokenizer import LinearTokenizer
from models.presets import PRESETS
from util import dist
from util.data import CachedFolder, ImageFolder, to_unit_range
from util.errors import UserError
from util.flags import make_parser, resolve

CPU = torch.device("cpu")


def write_tokenizer(path, scale):
    torch.manual_seed(0)
    metadata = {"channels": "4", "stride": "4", "latent_scale": str(scale)}
    save_file(LinearTokenizer(channels=4).state_dict(), path, metadata)


@pytest.fixture
def root(tmp_path):
    """Six pictures of two classes in `data/train`, and a tokenizer."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    write_tokenizer(tmp_path / "tokenizer.safetensors", scale=0.5)
    return tmp_path


def parse(root, program, *flags):
    args = ["--model", "mar_tiny", "--data_path", str(root / "data"), "--img_size", "8"]
    args += ["--vae_embed_dim", "4", "--vae_path", str(root / "tokenizer.safetensors")]
    args += ["--cached_path", str(root / "cached"), "--batch_size", "2", "--num_workers", "0"]
    args = make_parser(program).parse_args([*args, *flags])
    resolve(args, program, PRESETS)
    return args


def test_every_picture_gets_the_moments_of_itself_and_of_its_mirror_image(root):
    assert main_cache.cache(parse(root, "main_cache"), dist.World(), CPU) == 6
    tokenizer = LinearTokenizer.from_file(root / "tokenizer.safetensors")
    images, latents = ImageFolder(root / "data" / "train", 8), CachedFolder(root / "cached")
    assert (root / "cached" / "cat" / "0.png.npz").is_file()
    for index in range(6):
        for flip in (False, True):
            image, label = images[(index, flip)]
            moments, cached_label = latents[(index, flip)]
            expected = tokenizer.encode(to_unit_range(image)[None]).parameters[0]
            torch.testing.assert_close(moments, expected)
            assert label == cached_label


def test_a_second_call_writes_only_what_is_missing(root):
    main_cache.cache(parse(root, "main_cache"), dist.World(), CPU)
    kept, lost = (root / "cached" / "dog" / f"{i}.png.npz" for i in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert main_cache.cache(parse(root, "main_cache"), dist.World(), CPU) == 1
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == before


def test_latents_of_another_tokenizer_are_neither_mixed_in_nor_trained_on(root):
    main_cache.cache(parse(root, "main_cache"), dist.World(), CPU)
    write_tokenizer(root / "tokenizer.safetensors", scale=0.25)
    with pytest.raises(UserError, match="latents of another tokenizer"):
        main_cache.cache(parse(root, "main_cache"), dist.World(), CPU)
    with pytest.raises(UserError, match="latents of another tokenizer"):
        main_mar.open_data(parse(root, "main_mar", "--use_cached"))


def test_processes_share_the_pictures(root):
    args = parse(root, "main_cache")
    written = [main_cache.cache(args, dist.World(rank, 2), CPU) for rank in range(2)]
    assert written == [3, 3]


def test_a_missing_tokenizer_is_one_sentence(root):
    args = parse(root, "main_cache", "--vae_path", "nowhere.safetensors")
    with pytest.raises(UserError, match="nowhere"):
        main_cache.cache(args, dist.World(), CPU)


def test_training_from_pictures_equals_training_from_their_latents(root, monkeypatch):
    widths = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("embed_dim", 16), ("depth", 1), ("num_heads", 2))
    }
    monkeypatch.setattr(mar, "mar_tiny", partial(mar.MAR, **widths))
    main_cache.cache(parse(root, "main_cache"), dist.World(), CPU)
    weights = []
    for flags in ([], ["--use_cached"]):
        out = root / f"out{len(flags)}"
        flags += ["--output_dir", str(out), "--max_steps", "4", "--lr", "0.01"]
        flags += ["--warmup_epochs", "0", "--log_freq", "1"]
        main_mar.run(parse(root, "main_mar", *flags), dist.Meeting(), CPU)
        weights.append(torch.load(out / "checkpoint-last.pth", weights_only=False)["model"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-4, rtol=1e-3)
