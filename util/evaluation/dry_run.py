"""--dry_run: the plan of a run, and how long it would take, from one batch. Nothing is written."""

import torch

from util import dist
from util.evaluation.batches import jobs_of
from util.evaluation.generation import ImageGenerator, Stopwatch
from util.evaluation.run import Run
from util.evaluation.run_folder import RunFolder


@torch.no_grad()
def dry_run(
    run: Run,
    generator: ImageGenerator,
    world: dist.World,
    device: torch.device,
    flops_per_image: float,
) -> dict[str, object]:
    """Print the plan and return it (process 0; others {}). UserError where the run would refuse."""
    if not world.is_main:
        return {}
    grid, folder = run.task.grid, RunFolder(run.path)
    fresh = folder.check(run.config, run.num_images, run.settings.overwrite) or run.settings.no_save
    missing = list if fresh else folder.missing
    shares = [jobs_of(grid, rank, world.size, missing) for rank in range(world.size)]
    to_make = [sum(len(job.wanted) for job in jobs) for jobs in shares]
    flops = flops_per_image * grid.rows * sum(map(len, shares))
    print(f"folder: {folder.path}")
    print(f"to make: {sum(to_make)} of {run.num_images} images, batches of {grid.rows} on {device}")
    for rank, jobs in enumerate(shares):
        print(f"process {rank}: {to_make[rank]} images in {len(jobs)} batches")
    print(f"arithmetic: {flops_per_image:.3g} FLOPs per image, {flops:.3g} in all", flush=True)
    seconds = 0.0
    if sum(to_make):
        batch = next(jobs[0].batch for jobs in shares if jobs)
        prepared = generator.prepare(run.task.conditions(grid.padded(batch)), run.task.seeds(batch))
        # On CUDA the first batch compiles and the second records graphs.
        batches = 3 if device.type == "cuda" else 1
        for _ in range(batches):
            watch = Stopwatch(device)
            with watch:
                generator.generate(prepared)
            seconds = watch.seconds()
        rate = flops_per_image * grid.rows / seconds / 1e12
        print(f"one batch: {seconds:.3g} s, measured at batch {batches}; {rate:.3g} TFLOP/s")
    total = seconds * max(map(len, shares))
    print(f"estimate: {total:.0f} s = {total / 3600:.2f} h, scoring not counted")
    return {
        "dry_run": True,
        "folder": str(folder.path),
        "to_make": to_make,
        "batches": [len(jobs) for jobs in shares],
        "flops_per_image": flops_per_image,
        "sec_per_batch": seconds,
        "seconds": total,
    }
