"""eval.py as its users call it: images, score, repair, refusals. The model is random and small."""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import eval as eval_script
import main_mar
from models import mar
from models.tokenizers import latent_scale_of, load_tokenizer
from util.checkpoint import save_safetensors
from util.errors import run_main
from util.images import to_uint8

ROOT = Path(__file__).parent.parent
HEAD = {"diffloss_d": 1, "diffloss_w": 16, "num_sampling_steps": "ddim5"}
NUM_IMAGES = 20
PROMISED = {
    "model", "lazy_mar", "num_images", "num_iter", "cfg", "fid", "is_mean", "is_std",
    "sec_per_image", "images_dir", "device", "dtype",
}  # fmt: skip


def random_mar(seed: int) -> mar.MAR:
    """mar_tiny with a smaller head, and weights that make class, context and head matter."""
    torch.manual_seed(seed)
    model = mar.mar_tiny(**HEAD).eval()
    for parameter in model.parameters():  # adaLN and output layers start at zero
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Folder with one model in every format: official/, ema.pth, ema.safetensors, plain.pth."""
    folder = tmp_path_factory.mktemp("weights")
    plain, ema = (random_mar(seed).state_dict() for seed in (0, 1))
    (folder / "official").mkdir()
    content = {
        "model": plain,
        "model_ema": ema,
        "optimizer": {},
        "epoch": 1,
        "scaler": {},
        "args": argparse.Namespace(model="mar_tiny", lr=None, output_dir="./output_dir"),
    }
    torch.save(content, folder / "official" / "checkpoint-last.pth")
    torch.save(ema, folder / "ema.pth")
    torch.save(plain, folder / "plain.pth")
    save_safetensors(folder / "ema.safetensors", ema)
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """From the repository's root, where the bundled files are, and in one thread."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def flags_for(resume: Path, output_dir: Path, *flags: object) -> list[str]:
    """A short evaluation on the CPU; later flags win over earlier ones."""
    short = ["--model", "mar_tiny", "--num_iter", 2, "--num_images", 2, "--eval_bsz", 1]
    short += ["--cfg", 2.0, "--device", "cpu", "--threads", 1]
    for name, value in HEAD.items():
        short += [f"--{name}", value]
    return [str(word) for word in [*short, "--resume", resume, "--output_dir", output_dir, *flags]]


@pytest.fixture
def run(monkeypatch, capsys, weights, tmp_path):
    """Calls eval.py in this process, by default without scoring; returns its last line, parsed."""

    def call(*flags: object, resume: object = None, out: Path = tmp_path / "out") -> dict:
        argv = flags_for(resume or weights / "official", out, *flags)
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        capsys.readouterr()
        run_main(eval_script.main)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(run, capsys, tmp_path):
    """Calls eval.py with something wrong; returns the one sentence after `error: `."""

    def call(*flags: object, resume: object = None, out: Path = tmp_path / "refused") -> str:
        before = sorted(out.rglob("*.png"))
        with pytest.raises(SystemExit) as exit_info:
            run(*flags, resume=resume, out=out)
        assert exit_info.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert sorted(out.rglob("*.png")) == before
        return captured.err.removeprefix("error: ").rstrip("\n")

    return call


def images_of(result: dict) -> list[bytes]:
    """The bytes of every PNG of a run, in the order of their numbers."""
    return [path.read_bytes() for path in sorted(Path(result["images_dir"]).glob("*.png"))]


def pixels_of(result: dict) -> np.ndarray:
    """(N, H, W, 3) int16."""
    paths = sorted(Path(result["images_dir"]).glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.int16)


def written_at(result: dict) -> dict[str, int]:
    """When each PNG was last written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in Path(result["images_dir"]).iterdir()}


# ---- one scored run, as a command ------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(weights, tmp_path_factory) -> tuple[list[str], subprocess.CompletedProcess]:
    """The flags of a run with two images per class, and what the command printed."""
    out = tmp_path_factory.mktemp("scored")
    flags = ["--num_images", NUM_IMAGES, "--eval_bsz", NUM_IMAGES]
    argv = flags_for(weights / "official", out, *flags)
    command = [sys.executable, "eval.py", *argv]
    return argv, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def result(scored) -> dict:
    """The last line on its stdout; NaN is no JSON."""
    _, process = scored
    assert process.returncode == 0, process.stderr

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(process.stdout.splitlines()[-1], parse_constant=refuse)


def test_the_last_line_on_stdout_is_a_json_document_with_settings_score_and_speed(result):
    assert result.keys() >= PROMISED
    settings = ("model", "lazy_mar", "num_images", "num_iter", "cfg", "device", "dtype")
    expected = ("mar_tiny", False, NUM_IMAGES, 2, 2.0, "cpu", "float32")
    assert tuple(result[name] for name in settings) == expected
    assert result["fid"] > 0
    assert 1 <= result["is_mean"] <= 10  # the exponential of an information about ten classes
    assert result["is_std"] >= 0
    assert result["sec_per_image"] > 0


def test_results_and_a_contact_sheet_lie_beside_the_images(result):
    folder = Path(result["images_dir"]).parent
    assert json.loads((folder / "results.json").read_text()) == result
    with Image.open(folder / "sheet.png") as sheet:
        assert min(sheet.size) >= 64


def test_there_is_one_numbered_rgb_png_per_image_and_nothing_else(result):
    paths = sorted(Path(result["images_dir"]).iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(NUM_IMAGES)]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))


def test_every_class_gets_the_same_number_of_images_in_class_order(result):
    labels = [i // (NUM_IMAGES // 10) for i in range(NUM_IMAGES)]
    assert set(Counter(labels).values()) == {2}
    right, wrong = directly_sampled(labels), directly_sampled(labels[::-1])
    assert np.abs(pixels_of(result) - right).max() <= 1  # the weights' rounding may tip a byte
    differs = np.abs(pixels_of(result) - wrong).reshape(NUM_IMAGES, -1).max(axis=1) > 1
    assert differs.all()


def directly_sampled(labels: list[int]) -> np.ndarray:
    """Images of these labels and of the seeds that eval.py gives them: (N, H, W, 3) int16."""
    model = random_mar(1)  # the averaged weights
    tokenizer = load_tokenizer("linear", "pretrained_models/mar_tiny/tokenizer.safetensors", 8)
    seeds = [engine.image_seed(1, i) for i in range(len(labels))]
    noise = model.image_noise(seeds)
    latents = model.sample_tokens(len(labels), 2, 2.0, labels=labels, noise=noise)
    with torch.no_grad():
        images = tokenizer.decode(latents / latent_scale_of(tokenizer, None))
    return to_uint8(images).astype(np.int16)


def test_labels_of_fifty_thousand_images_are_those_of_the_original():
    labels = [engine.image_label(i, 50000, 1000) for i in range(50000)]
    assert labels == [i // 50 for i in range(50000)]


def test_where_classes_cannot_share_the_images_equally_they_differ_by_one():
    counts = Counter(engine.image_label(i, 25, 10) for i in range(25))
    assert (set(counts), set(counts.values())) == (set(range(10)), {2, 3})


def test_the_same_command_again_generates_nothing_and_gives_the_same_score(
    scored, result, monkeypatch, capsys
):
    before = written_at(result)
    monkeypatch.setattr(sys, "argv", ["eval.py", *scored[0]])
    eval_script.main()
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert written_at(again) == before
    assert again["generated"] == result["generated"] == NUM_IMAGES
    for name in ("fid", "is_mean", "is_std"):
        assert again[name] == pytest.approx(result[name], rel=1e-6)
    assert again["sec_per_image"] == result["sec_per_image"]


def test_a_mistake_on_the_command_line_ends_in_one_sentence_and_exit_code_2(tmp_path):
    argv = flags_for(tmp_path / "none", tmp_path / "out")
    command = [sys.executable, "eval.py", *argv]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"error: no checkpoint at {tmp_path / 'none'}")
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ---- weights -----------------------------------------------------------------------------------------


def test_every_format_of_the_same_weights_gives_the_same_images(run, weights, tmp_path):
    formats = ("official", "official/checkpoint-last.pth", "ema.pth", "ema.safetensors")
    runs = [
        run("--no_score", resume=weights / name, out=tmp_path / str(i))
        for i, name in enumerate(formats)
    ]
    first, *others = (images_of(result) for result in runs)
    assert len(first) == 2
    assert all(other == first for other in others)


def test_averaged_weights_are_used_unless_no_ema_asks_for_the_others(run, weights, tmp_path):
    averaged = run("--no_score", out=tmp_path / "averaged")
    plain = run("--no_score", "--no_ema", out=tmp_path / "plain")
    bare = run("--no_score", resume=weights / "plain.pth", out=tmp_path / "bare")
    assert images_of(plain) == images_of(bare)
    assert all(a != b for a, b in zip(images_of(averaged), images_of(plain), strict=True))


def test_main_mar_with_evaluate_makes_the_images_of_eval(
    run, weights, tmp_path, monkeypatch, capsys
):
    expected = run("--no_score")
    argv = flags_for(weights / "official", tmp_path / "main_mar", "--no_score", "--evaluate")
    monkeypatch.setattr(sys, "argv", ["main_mar.py", *argv])
    main_mar.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert images_of(result) == images_of(expected)


# ---- the run's folder --------------------------------------------------------------------------------


def test_a_missing_and_a_truncated_image_are_made_again_and_no_other(run):
    first = run("--no_score", "--num_images", 4)
    images, times = images_of(first), written_at(first)
    missing, truncated = (Path(first["images_dir"]) / f"{i:05d}.png" for i in (1, 2))
    missing.unlink()
    truncated.write_bytes(images[2][: len(images[2]) // 2])
    second = run("--no_score", "--num_images", 4)
    assert second["generated"] - first["generated"] == 2
    assert images_of(second) == images
    kept = ("00000.png", "00003.png")
    assert [written_at(second)[name] for name in kept] == [times[name] for name in kept]


def test_a_folder_refuses_the_images_of_another_configuration(run, refused, tmp_path):
    first = run("--no_score")
    images = images_of(first)
    message = refused("--no_score", "--seed", 2, out=tmp_path / "out")
    assert "seed 1" in message
    assert "--overwrite" in message
    assert images_of(first) == images


@pytest.mark.parametrize(
    "flags",
    [["--no_ema"], ["--latent_scale", 1.5], ["--dtype", "bf16"], ["--num_sampling_steps", "ddim4"]],
    ids=lambda flags: flags[0],
)
def test_whatever_changes_the_images_is_part_of_the_configuration(run, refused, tmp_path, flags):
    run("--no_score")
    assert "holds a run with" in refused("--no_score", *flags, out=tmp_path / "out")


def test_overwrite_replaces_the_images_of_another_configuration(run, tmp_path):
    run("--no_score", "--num_images", 2)
    replaced = run("--no_score", "--seed", 2, "--overwrite")
    fresh = run("--no_score", "--seed", 2, out=tmp_path / "fresh")
    assert replaced["generated"] == 2
    assert images_of(replaced) == images_of(fresh)


def test_runs_of_different_methods_share_an_output_folder(run):
    folders = {
        run("--no_score", *flags)["images_dir"]
        for flags in ([], ["--lazy_mar"], ["--lazy_mar", "--interval", 3], ["--num_iter", 3])
    }
    assert len(folders) == 4


def test_generation_alone_needs_neither_statistics_nor_a_feature_extractor(run, tmp_path):
    none = tmp_path / "none"
    result = run("--no_score", "--fid_stats", none, "--features_path", none)
    assert len(images_of(result)) == 2
    assert result.keys() >= PROMISED
    assert result["fid"] is result["is_mean"] is result["is_std"] is None


def test_bf16_is_said_and_stays_near_float32(run, tmp_path):
    exact = run("--no_score", out=tmp_path / "float32")
    half = run("--no_score", "--dtype", "bf16", out=tmp_path / "bf16")
    assert (exact["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert 0 < np.abs(pixels_of(exact) - pixels_of(half)).mean() < 8


# ---- LazyMAR -----------------------------------------------------------------------------------------

SHORT_LAZY = ["--no_score", "--num_iter", 6, "--lazy_mar", "--warmup", 1, "--interval", 3]
SHORT_LAZY += ["--probe_layer", 1, "--keep_floor", 4, "--keep", "0:1,0.1:0.05"]


def test_each_cache_switches_off_alone_and_matters(run, tmp_path):
    on = run(*SHORT_LAZY, out=tmp_path / "on")
    assert on["lazy_mar"] is True
    for cache in ("token_cache", "condition_cache", "head_cache"):
        off = run(*SHORT_LAZY, f"--no_{cache}", out=tmp_path / cache)
        spelled = run(*SHORT_LAZY, f"--{cache}", "false", out=tmp_path / f"{cache}_false")
        assert images_of(off) != images_of(on), cache
        assert images_of(spelled) == images_of(off), cache


def test_every_field_of_lazymar_is_a_flag_that_takes_effect(run, tmp_path):
    on = run(*SHORT_LAZY, out=tmp_path / "on")
    others = {
        "--warmup": 4,
        "--interval": 2,
        "--probe_layer": 2,
        "--keep_floor": 30,
        "--keep": "0:1,0.1:0.5",
        "--head_interval": 2,
        "--head_skip": "0",
        "--head_warm": 0.1,
    }
    for name, value in others.items():
        changed = run(*SHORT_LAZY, name, value, out=tmp_path / name)
        assert images_of(changed) != images_of(on), name


def test_lazymar_that_caches_nothing_is_mar(run, tmp_path):
    plain = run("--no_score", "--num_iter", 6, out=tmp_path / "plain")
    flags = ["--lazy_mar", "--interval", 1, "--no_head_cache"]
    lazy = run("--no_score", "--num_iter", 6, *flags, out=tmp_path / "lazy")
    assert (plain["lazy_mar"], lazy["lazy_mar"]) == (False, True)
    assert np.abs(pixels_of(plain) - pixels_of(lazy)).max() <= 1


# ---- refusals ----------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_checkpoint_is_never_replaced_by_random_weights(
    refused, weights, tmp_path
):
    whole = (weights / "official" / "checkpoint-last.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><p>Sign in</p>")
    (tmp_path / "empty.pth").write_bytes(b"")
    whole = (weights / "ema.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    cases = {
        "none": "no checkpoint at",
        "cut.pth": "truncated",
        "cut.safetensors": "truncated",
        "page.pth": "HTML page",
        "empty.pth": "is empty",
        "other.pth": "of another model",
    }
    for name, words in cases.items():
        assert words in refused("--no_score", resume=tmp_path / name), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--diffloss_w", 32], "check the model's flags"),
        (["--diffloss_d", 2], "of another model"),
        (["--class_num", 1000], "check the model's flags"),
        (["--img_size", 128], "check the model's flags"),
        (["--img_size", 0], "img_size is 0"),
        (["--img_size", 30], "img_size 30"),
        (["--img_size", -64], "img_size"),
        (["--patch_size", 0], "patch_size"),
        (["--vae_stride", 0], "vae_stride"),
        (["--vae_embed_dim", -1], "vae_embed_dim"),
        (["--class_num", -1], "class_num"),
        (["--diffloss_w", 0], "diffloss_w"),
        (["--model", "mar_medium"], "mar_medium is unknown"),
        (["--num_iter", 0], "num_iter is 0"),
        (["--num_sampling_steps", "many"], "num_sampling_steps is 'many'"),
        (["--num_sampling_steps", 2000], "cannot take 2000 timesteps"),
        (["--num_images", 0], "num_images"),
        (["--num_images", -3], "num_images"),
        (["--eval_bsz", 0], "eval_bsz"),
        (["--eval_bsz", -1], "eval_bsz"),
        (["--threads", -1], "threads"),
        (["--seed", -1], "seed"),
        (["--cfg", "nan"], "cfg is nan"),
        (["--latent_scale", 0], "contain NaN or infinity"),
        (["--device", "gpu"], "--device gpu is not a device name"),
        (["--vae_path", "none.safetensors"], "none.safetensors"),
        (["--tokenizer", "kl16", "--vae_path", "none.ckpt"], "none.ckpt"),
        (["--vae_path", "pyproject.toml"], "pyproject.toml is damaged"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_generated(refused, flags, words):
    assert words in refused("--no_score", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--interval", 3], "--interval belongs to LazyMAR"),
        (["--no_token_cache"], "--token_cache belongs to LazyMAR"),
        (["--lazy_mar", "--interval", 0], "interval is 0"),
        (["--lazy_mar", "--keep", "0.5:0.1"], "keep has progress"),
        (["--lazy_mar", "--head_warm", 2], "head_warm is 2"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_constants_of_lazymar_that_have_no_effect_or_sense_are_refused(refused, flags, words):
    assert words in refused("--no_score", *flags)


def test_cuda_where_there_is_none_is_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "PyTorch sees no CUDA device here" in refused("--no_score", "--device", "cuda")


def test_missing_statistics_are_reported_before_anything_is_generated(refused, tmp_path):
    message = refused("--fid_stats", tmp_path / "none.npz")
    assert "none.npz are missing" in message
    assert "python -m util.download fid_stats" in message


def test_missing_weights_of_inception_are_reported_before_anything_is_generated(refused, tmp_path):
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    flags = ["--features", "inception-v3-compat", "--features_path", tmp_path / "none.pth"]
    message = refused(*flags, "--fid_stats", stats)
    assert "none.pth are missing" in message
    assert "python -m util.download inception" in message


def test_a_damaged_file_for_scoring_is_reported_before_anything_is_generated(refused, tmp_path):
    (tmp_path / "page").write_text("<!DOCTYPE html><p>Sign in</p>")
    assert "page is not a shape classifier's file" in refused("--features_path", tmp_path / "page")
    assert "page is no file of FID statistics" in refused("--fid_stats", tmp_path / "page")
    assert "none is missing" in refused("--features_path", tmp_path / "none")
    assert "unknown feature extractor" in refused("--features", "resnet")


def test_statistics_of_another_extractor_are_refused(refused, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "holds 3-d statistics" in refused("--fid_stats", tmp_path / "stats.npz")


def test_too_few_images_for_a_score_are_reported_before_they_are_generated(refused):
    assert "at least 2 images" in refused("--num_images", 1)


def test_an_output_folder_that_cannot_be_made_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("--no_score", out=tmp_path / "file")
