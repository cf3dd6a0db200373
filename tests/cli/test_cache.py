"""main_cache.py: latents on disk, and training from pictures and from their latents."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import main_cache
import main_mar
from engine import cli
from models import tokenizers
from models.linear_tokenizer import LinearTokenizer
from models.vae import AutoencoderKL, DiagonalGaussianDistribution
from util import dist
from util.data.config import DataConfig
from util.data.datasets import BatchPlan, CachedFolder, ImageFolder, to_unit_range
from util.errors import UserError

CPU = torch.device("cpu")


def write_tokenizer(path, scale, fill=None):
    torch.manual_seed(0)
    metadata = {"channels": "4", "stride": "4", "latent_scale": str(scale)}
    weights = LinearTokenizer(channels=4).state_dict()
    if fill is not None:
        weights = {name: torch.full_like(weight, fill) for name, weight in weights.items()}
    save_file(weights, path, metadata)


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


def words_for(root, *flags):
    words = ["--model", "mar_tiny", "--data_path", str(root / "data"), "--img_size", "8"]
    words += ["--vae_embed_dim", "4", "--vae_path", str(root / "tokenizer.safetensors")]
    words += ["--cached_path", str(root / "cached"), "--batch_size", "2", "--num_workers", "0"]
    return [*words, *map(str, flags)]


def cache(root, *flags, world=None):
    """main_cache.py in this process; returns the number of files written."""
    selection = cli.parse("main_cache", words=words_for(root, *flags))
    data = selection.flags.build(DataConfig)
    return main_cache.cache(selection.host(), data, 2, world or dist.World(), CPU)


def train(root, *flags):
    """main_mar.py in this process."""
    main_mar.run(main_mar.parse(words_for(root, *flags)), dist.Rendezvous())


def test_every_picture_gets_the_moments_of_itself_and_of_its_mirror_image(root):
    assert cache(root) == 6
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
    cache(root)
    kept, lost = (root / "cached" / "dog" / f"{i}.png.npz" for i in (0, 1))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert cache(root) == 1
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == before


def test_latents_of_another_tokenizer_are_neither_mixed_in_nor_trained_on(root):
    cache(root)
    write_tokenizer(root / "tokenizer.safetensors", scale=0.25)
    with pytest.raises(UserError, match="latents of another tokenizer"):
        cache(root)
    with pytest.raises(UserError, match="latents of another tokenizer"):
        train(root, "--use_cached", "--output_dir", root / "out")


def test_the_scale_that_makes_the_deviation_one_is_printed(root, capsys):
    cache(root)
    scale = float(capsys.readouterr().out.split("--latent_scale ")[1].split()[0])
    data = CachedFolder(root / "cached")
    moments = torch.stack([data[(i, False)][0] for i in range(6)])
    torch.manual_seed(0)
    draws = torch.cat([DiagonalGaussianDistribution(moments).sample() for _ in range(50)])
    assert scale * draws.std().item() == pytest.approx(1, abs=0.02)


def test_nan_is_neither_written_nor_trained_on(root):
    write_tokenizer(root / "tokenizer.safetensors", scale=0.5, fill=torch.nan)
    with pytest.raises(UserError, match=r"makes NaN or infinity of cat/0\.png"):
        cache(root)
    assert not list((root / "cached").rglob("*.npz"))


def test_processes_share_the_pictures(root):
    written = [cache(root, world=dist.World(rank, 2)) for rank in range(2)]
    assert written == [3, 3]


def test_a_missing_tokenizer_is_one_sentence(root):
    with pytest.raises(UserError, match="nowhere"):
        cache(root, "--vae_path", "nowhere.safetensors")


def test_a_truncated_picture_is_named_and_the_last_checkpoint_stays(root, small_model, capsys):
    dogs = root / "data" / "train" / "dog"
    for i in range(10, 47):
        shutil.copy(dogs / "0.png", dogs / f"{i}.png")
    step = 4
    read = {0, 3, *np.linspace(0, 42, 16).astype(int).tolist()}  # before training, see data_check
    index = next(i for i, _ in BatchPlan(43, 2, seed=1).epoch(0)[step] if i not in read)
    path = Path(ImageFolder(dogs.parent, 8).files.samples[index][0])
    path.write_bytes(path.read_bytes()[:60])
    flags = ["--output_dir", str(root / "out"), "--save_minutes", "1e-9"]
    with pytest.raises(UserError, match=rf"{path} cannot be read as an image"):
        train(root, *flags)
    kept = torch.load(root / "out" / "checkpoint-last.pth", weights_only=False)
    assert kept["progress"]["step"] == step
    assert f"holds the run up to step {step}; continue with --resume" in capsys.readouterr().err


LARGE = ["--model", "mar_large", "--vae_embed_dim", "16", "--class_num", "2", "--buffer_size", "2"]
LARGE += ["--diffloss_d", "1", "--diffloss_w", "16", "--latent_scale", "0.5", "--max_steps", "1"]
LARGE += ["--warmup_epochs", "0", "--log_freq", "1"]


def trained(root):
    """The weights after a step that moved them."""
    content = torch.load(root / "out" / "checkpoint-last.pth", weights_only=False)
    changed = [
        k for k, v in content["model"].items() if not torch.equal(v, content["model_ema"][k])
    ]
    assert any("diffloss" in name for name in changed)
    return content["model"]


def test_another_size_class_count_and_scale_train_with_a_kl_tokenizer(
    root, monkeypatch, small_model, capsys
):
    small = partial(AutoencoderKL, ch=32, num_res_blocks=1)
    monkeypatch.setattr(tokenizers, "AutoencoderKL", small)
    torch.save({"model": small(16, (1, 1, 2, 2, 4)).state_dict()}, root / "kl.ckpt")
    flags = [*LARGE, "--img_size", "96", "--vae_path", str(root / "kl.ckpt")]
    flags += ["--output_dir", str(root / "out")]
    train(root, *flags)
    assert "latent scale 0.5" in capsys.readouterr().out
    weights = trained(root)
    assert weights["diffusion_pos_embed_learned"].shape == (1, 6 * 6, 16)
    assert weights["class_emb.weight"].shape == (2, 16)


def test_512_pixels_train_from_latents_without_a_tokenizer(root, small_model):
    for name in ("cat", "dog"):
        (root / "cached" / name).mkdir(parents=True)
        for i in range(2):
            moments = np.random.default_rng(i).normal(0, 0.1, (32, 32, 32)).astype(np.float32)
            np.savez(root / f"cached/{name}/{i}.JPEG.npz", moments=moments, moments_flip=moments)
    flags = [*LARGE, "--img_size", "512", "--use_cached", "--vae_path", "none.ckpt"]
    flags += ["--output_dir", str(root / "out")]
    train(root, *flags)
    assert trained(root)["diffusion_pos_embed_learned"].shape == (1, 32 * 32, 16)


def test_training_from_pictures_equals_training_from_their_latents(root, small_model):
    cache(root)
    weights = []
    for flags in ([], ["--use_cached"]):
        out = root / f"out{len(flags)}"
        flags += ["--output_dir", str(out), "--max_steps", "4", "--lr", "0.01"]
        flags += ["--warmup_epochs", "0", "--log_freq", "1"]
        train(root, *flags)
        weights.append(torch.load(out / "checkpoint-last.pth", weights_only=False)["model"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-4, rtol=1e-3)
