"""Precompute the latents of a training set: per image an npz with `moments` and `moments_flip`.

    python main_cache.py --model mar_tiny --data_path data/shapes --cached_path data/shapes_latents

ROOT/train/CLASS/NAME becomes CACHED/CLASS/NAME.npz. Existing files are kept, so the same command continues
after an interruption. Several processes (torchrun) share the images. At the end it prints the
--latent_scale that gives the latents the standard deviation of 1 that training needs.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from engine import cli
from engine.mar import MARHost, mar_host
from util import dist
from util.data.checks import check_files, note
from util.data.config import DataConfig
from util.data.datasets import ImageFolder, batches, to_unit_range
from util.data.latents import write_moments, write_note
from util.errors import UserError, run_main
from util.training.config import TrainConfig


@torch.no_grad()
def cache(
    host: MARHost, data: DataConfig, batch_size: int, world: dist.World, device: torch.device
) -> int:
    """Write the missing files of this process's share; returns their number."""
    if data.cached_path is None:
        raise UserError("--cached_path DIR is missing: the folder for the latents")
    img_size, vae_path = host.geometry.img_size, host.tokenizer.vae_path
    images = ImageFolder(Path(data.data_path) / "train", img_size)
    for text in images.files.notes():
        note(text, world)
    check_files(images, world, data.check_data, data.num_workers)
    folder = Path(data.cached_path)
    targets = [folder / f"{images.relative_path(i)}.npz" for i in range(len(images))]
    missing = [i for i in range(world.rank, len(images), world.size) if not targets[i].exists()]
    groups = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    picks = [[(index, False) for index in group] for group in groups]
    tokenizer = host.open_tokenizer(device)
    write_note(folder, host.tokenizer.files, img_size)
    read = zip(groups, batches(images, picks, data.num_workers), strict=True)
    count, total = 0, torch.zeros((), dtype=torch.float64)  # of all latents written here
    squares = total
    bar = tqdm(read, total=len(groups), unit="batch", disable=None)
    for group, (batch, _) in bar:
        x = to_unit_range(batch.to(device))
        posterior = tokenizer.encode(x)
        moments = posterior.parameters.float().cpu()
        moments_flip = tokenizer.encode(x.flip(-1)).parameters.float().cpu()
        for i, index in enumerate(group):
            if not torch.isfinite(moments[i]).all():
                raise UserError(
                    f"the tokenizer {vae_path} makes NaN or infinity of "
                    f"{images.relative_path(index)}: is it the right --tokenizer and --vae_path?"
                )
            write_moments(targets[index], moments[i], moments_flip[i])
        mean, var = posterior.mean.double().cpu(), posterior.var.double().cpu()
        count, total = count + mean.numel(), total + mean.sum()
        squares = squares + (mean.square() + var).sum()
    if count and world.is_main:
        spread = (squares / count - (total / count) ** 2).sqrt().item()
        print(
            f"the latents' standard deviation is {spread:.4g}: --latent_scale {1 / spread:.4g} makes it 1"
        )
    return len(missing)


def main() -> None:
    selection = cli.parse("main_cache", __doc__.splitlines()[0])
    host, place = mar_host(selection.host()), cli.place(selection.flags)
    data = selection.flags.build(DataConfig)
    batch_size = selection.flags.build(TrainConfig).batch_size
    written = cache(host, data, batch_size, place.world, place.device)
    print(f"process {place.world.rank}: {written} files written to {data.cached_path}")


if __name__ == "__main__":
    run_main(main)
