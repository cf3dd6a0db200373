"""An evaluation of a host in its run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.base import Execution, Host, Loaded
from util import dist
from util.evaluation import run as evaluation
from util.evaluation.batches import BatchGrid, Task
from util.evaluation.config import EvaluationConfig
from util.evaluation.dry_run import dry_run
from util.evaluation.request import ScoreRequest


def evaluate(
    host: Host,
    loaded: Loaded,
    settings: EvaluationConfig,
    request: ScoreRequest | None,
    execution: Execution,
    rendezvous: dist.Rendezvous,
    arguments: Mapping[str, object],
    redo: bool = True,
) -> dict[str, Any]:
    """Generate the missing images of a run, score it, and return its results (process 0; others {}).

    Args:
        request: what to score; None generates only.
        arguments: flags of the command, recorded in the manifest.
        redo: False does not score a complete run again.

    With settings.dry_run one batch is generated and nothing is written.
    """
    device, dtype = execution.device, execution.dtype
    conditions = host.conditions(settings.prompts)
    config = {
        "model": host.model,
        "weights": loaded.weights,
        "num_images": settings.num_images,
        **conditions.describe(),
        **host.config(loaded, dtype),
        "seed": settings.seed,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "seed_mode": settings.seed_mode,
    }
    if settings.seed_mode == "rank":  # then these decide the images, too
        config |= {"processes": rendezvous.world.size, "eval_bsz": settings.eval_bsz}
    grid = BatchGrid.create(settings.num_images, settings.eval_bsz)
    run = evaluation.Run(
        path=Path(settings.output_dir) / host.run_name(settings.num_images),
        task=Task(grid, conditions, settings.seed, settings.seed_mode, rendezvous.world.size),
        settings=settings,
        config=config,
        summary={"model": host.model, "num_images": settings.num_images, **host.summary()},
        arguments=arguments,
        request=request,
    )
    if not redo and (results := evaluation.finished(run)):
        return results
    generator = host.generator(loaded, execution)
    if settings.dry_run:
        flops = host.flops_per_image(loaded.model)
        return dry_run(run, generator, rendezvous.world, device, flops)
    return evaluation.evaluate(run, generator, rendezvous, device)
