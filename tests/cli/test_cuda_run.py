"""On a GPU: 2,000 images by torchrun, resumed with the same bits. Run with `make test-gpu`."""

import shutil
from pathlib import Path

import pytest
import torch

from models.vae import AutoencoderKL
from tests.support import NEEDS_GPU
from tests.support.processes import agent, finish, free_port, result_of
from tests.support.runs import scores
from util.device import to_device, to_host
from util.images import png_name

pytestmark = NEEDS_GPU
IMAGES = 2000


@pytest.mark.parametrize("method", [[], ["--lazy_mar"]], ids=["mar", "lazy_mar"])
def test_two_thousand_images_of_the_bundled_model_resumed_and_streamed(tmp_path, method):
    processes = torch.cuda.device_count()
    argv = ["--model", "mar_tiny", "--num_images", str(IMAGES), "--eval_bsz", "250", *method]

    def run(folder, *flags):
        words = [*argv, "--output_dir", str(tmp_path / folder), *flags]
        return result_of(finish(agent(1, processes, free_port(), words)))

    whole = run("whole")
    print({k: v for k, v in whole.items() if k.startswith(("images_per_s", "fid", "device"))})
    assert whole["generated"] == IMAGES and whole["accuracy"] > 0.9
    assert whole["images_per_s"] > 0.8 * whole["images_per_s_without_saving"]
    folder = Path(whole["images_dir"])
    lost = {i: (folder / png_name(i)).read_bytes() for i in range(700, 1300, 7)}
    for index in lost:
        (folder / png_name(index)).unlink()
    again = run("whole")
    assert all((folder / png_name(i)).read_bytes() == content for i, content in lost.items())
    assert again["generated"] == IMAGES + len(lost)
    assert scores(run("streamed", "--no_save")) == pytest.approx(scores(whole), rel=1e-3)
    shutil.rmtree(folder.parent)


def test_channels_last_in_half_precision_decodes_the_same_pictures():
    torch.manual_seed(0)
    vae = AutoencoderKL(16, ch_mult=(1, 1, 2, 2, 4)).to("cuda").eval()
    latents = torch.randn(2, 16, 16, 16, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        plain = vae.decode(latents).float()
        last = vae.to(memory_format=torch.channels_last).decode(latents).float()
    assert (plain - last).abs().max() < 0.05 * plain.abs().max()


def test_copies_to_and_from_the_device_are_exact():
    tensors = [torch.randn(5, 3), torch.arange(4)]
    fetched = to_host([to_device(tensor, torch.device("cuda")) for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(tensors, fetched(), strict=True))
