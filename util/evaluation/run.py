"""One evaluation: generate the missing images, score them, write the results.

Processes do not wait for each other while they generate: each makes the missing images of its own
batches (util/evaluation/batches.py). Then each extracts the features of its share of the images and
writes its sums into the run folder, and process 0 adds them up. All processes must see that folder.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from util import dist
from util.device import device_name
from util.errors import UserError
from util.evaluation.batches import Task, jobs_of
from util.evaluation.conditions import Condition, Conditions
from util.evaluation.config import EvaluationConfig
from util.evaluation.generation import FeatureSink, ImageGenerator, PngSink, Production, produce
from util.evaluation.image_source import open_source
from util.evaluation.request import RESULT_OF, SCORES, ScoreRequest
from util.evaluation.run_folder import MAY_DIFFER, RunFolder, provenance
from util.evaluation.scores import Scorer
from util.files import atomic_path, write_json
from util.images import list_images


@dataclass(frozen=True)
class Run:
    """One evaluation.

    config: everything that decides the images; constant in a folder. summary: the model's entries of
    results.json. arguments: the command's flags. request: None generates only.
    """

    path: Path
    task: Task
    settings: EvaluationConfig
    config: Mapping[str, object]
    summary: Mapping[str, object]
    arguments: Mapping[str, object]
    request: ScoreRequest | None

    @property
    def num_images(self) -> int:
        return self.task.grid.num_images

    def all_conditions(self) -> Sequence[Condition]:
        """Label or prompt of every image."""
        return self.task.conditions(range(self.num_images))


def finished(run: Run) -> dict[str, object]:
    """The results if all images exist and are scored as requested, else {}."""
    folder = RunFolder(run.path)
    results = folder.results()
    if not results or run.request is None or folder.conflict(run.config):
        return {}
    scored = results.get("reference") == run.request.reference and all(
        results.get(RESULT_OF[metric]) is not None for metric in run.request.metrics
    )
    return results if scored and not folder.missing(range(run.num_images)) else {}


def evaluate(
    run: Run, generator: ImageGenerator, rendezvous: dist.Rendezvous, device: torch.device
) -> dict[str, object]:
    """Make the missing images of a run, score it, write and return its results (process 0; others {})."""
    world, folder = rendezvous.world, RunFolder(run.path)
    rendezvous.next_round()
    if world.is_main:
        _open(run, folder, world, device, getattr(generator, "execution", {}))
        rendezvous.publish("opened")
    rendezvous.wait("opened", ranks=[0])
    _check_shared(folder, world)

    scorer = None
    if run.settings.no_save:
        assert run.request is not None  # EvaluationConfig refuses no_save without scores
        scorer = Scorer(run.request, run.num_images, device, run.all_conditions())
    rendezvous.publish("made", asdict(_make(run, folder, generator, scorer, world, device)))
    call = _sum_up([Production(**message) for message in rendezvous.wait("made")])
    if world.is_main and not run.settings.no_save:
        folder.amend_call({"made": call})

    began = time.perf_counter()
    if not run.settings.no_save and run.request:
        if world.size > 1:
            _wait_until(lambda: len(list_images(folder.images)) >= run.num_images)
        images = open_source(folder.images, run.num_images)
        scorer = Scorer(run.request, run.num_images, device, run.all_conditions())
        scorer.add(images, _part(run.num_images, world))
    if scorer:
        _merge(scorer, folder.path, rendezvous)
    if not world.is_main:
        return {}
    scores = scorer.result() if scorer else {}
    scoring = time.perf_counter() - began if scorer else None

    folder.sweep()
    if not run.settings.no_save:
        folder.write_sheet(run.num_images)
    if run.settings.save_npz:
        folder.write_npz(run.all_conditions())
    calls: list[Mapping[str, Any]] = [call]
    if not run.settings.no_save:
        calls = [each["made"] for each in folder.calls() if "made" in each]
    results = {
        **run.summary,
        **_timings(calls),
        "seconds_scoring": scoring,
        "processes": world.size,
        "eval_bsz": run.settings.eval_bsz,
        "threads": torch.get_num_threads(),
        "images_dir": str(folder.images) if not run.settings.no_save else None,
        "device": str(device),
        "device_name": device_name(device),
        "dtype": run.config["dtype"],
        "seeds": f"{run.config['seed_mode']} {run.config['seed']}",
        **provenance(),
        "mixed": _mixed(folder),
        "config": dict(run.config),
        **dict.fromkeys(("fid", "is_mean", "is_std")),
        **_comparable(folder.results(), scores),
        **scores,
    }
    write_json(folder.path / "results.json", results)
    return results


def _make(
    run: Run,
    folder: RunFolder,
    generator: ImageGenerator,
    scorer: Scorer | None,
    world: dist.World,
    device: torch.device,
) -> Production:
    """Make this process's share of the images: the missing ones, or all of them for the scorer."""
    grid = run.task.grid
    jobs = jobs_of(grid, world.rank, world.size, list if scorer else folder.missing)
    sink = FeatureSink(scorer.update) if scorer else PngSink(folder.image, grid.rows)
    show = world.is_main and sys.stderr.isatty()
    wanted = sum(len(job.wanted) for job in jobs)
    with tqdm(total=wanted, unit="image", disable=not show) as bar:
        return produce(generator, run.task, jobs, sink, device, bar.update)


def score_only(
    path: Path,
    request: ScoreRequest,
    num_images: int,
    conditions: Conditions,
    rendezvous: dist.Rendezvous,
    device: torch.device,
) -> dict[str, object]:
    """Score a run's folder, or a folder of numbered PNGs; returns the results (process 0; others {}).

    A run's results.json is updated; a folder of images alone is not changed.
    """
    folder, world = RunFolder(path), rendezvous.world
    rendezvous.next_round()
    manifest = folder.manifest()
    is_run = bool(manifest)
    drawn, given = (
        about.get("prompts") for about in (manifest.get("config", {}), conditions.describe())
    )
    if drawn not in (None, given):
        raise UserError(
            f"images in {path} were made from prompts {drawn!r}, not {given!r}: pass that file with "
            "--prompts"
        )
    former = folder.results() if is_run else {}
    images = folder.images if is_run else path
    labels = conditions.of(range(num_images), num_images)
    dataset = open_source(images, num_images)
    scorer = Scorer(request, num_images, device, labels)
    scorer.add(dataset, _part(num_images, world))
    _merge(scorer, path, rendezvous)
    if not world.is_main:
        return {}
    scores = {"num_images": num_images, "images_dir": str(images), **scorer.result()}
    if not is_run:
        return {**scores, **provenance()}
    others = {name: value for name, value in former.items() if name not in SCORES}
    results = {**others, **_comparable(former, scores), **scores}
    write_json(path / "results.json", results)
    return results


def _open(
    run: Run,
    folder: RunFolder,
    world: dist.World,
    device: torch.device,
    execution: Mapping[str, object],
) -> None:
    """Open the folder and print notes for the user on stderr."""
    call = {
        **provenance(),
        "device_name": device_name(device),
        "processes": world.size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        **execution,
        "eval_bsz": run.settings.eval_bsz,
        "vae_bsz": run.arguments.get("vae_bsz"),
        "arguments": dict(run.arguments),
    }
    changes = folder.open(run.config, call, run.num_images, run.settings.overwrite)
    if changes:
        print(
            f"note: {folder.path} continues with {', '.join(changes)}: pixels may differ in rounding",
            file=sys.stderr,
        )
    batches = len(run.task.grid)
    if batches < world.size:
        print(
            f"note: only {batches} of {world.size} processes have work; --eval_bsz "
            f"{max(1, run.num_images // world.size)} or less uses {min(world.size, run.num_images)}",
            file=sys.stderr,
        )


def _check_shared(folder: RunFolder, world: dist.World) -> None:
    """UserError if this process does not see the folder of process 0 (NFS may take a while)."""
    if not _wait_until(lambda: bool(folder.manifest())):
        raise UserError(
            f"process {world.rank} does not see {folder.path}: give an --output_dir that all "
            "machines share"
        )


def _wait_until(seen: Callable[[], bool], seconds: int = 30) -> bool:
    """Whether `seen` becomes true in time: a shared folder shows files of other machines late."""
    for _ in range(seconds):
        if seen():
            return True
        time.sleep(1)
    return seen()


def _comparable(former: Mapping, scores: Mapping) -> dict[str, object]:
    """Earlier scores of the same images, unless they have another reference."""
    if scores and former.get("reference") != scores["reference"]:
        return {}
    return {name: former[name] for name in SCORES if name in former}


def _part(num_images: int, world: dist.World) -> range:
    """The images that a process scores."""
    bounds = [rank * num_images // world.size for rank in (world.rank, world.rank + 1)]
    return range(*bounds)


def _merge(scorer: Scorer, folder: Path, rendezvous: dist.Rendezvous) -> None:
    """Add the sums of all processes in process 0, through files in the run's folder."""
    world = rendezvous.world
    if world.size == 1:
        return

    def file_of(rank: int) -> Path:
        return folder / f".sums-{rank}.part"

    if not world.is_main:
        with atomic_path(file_of(world.rank)) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in scorer.sums.sums.items()}, temporary)
        rendezvous.publish("scored")
        return
    others = range(1, world.size)
    rendezvous.wait("scored", others)
    for rank in others:
        if not _wait_until(file_of(rank).exists):
            raise UserError(
                f"process 0 does not see {file_of(rank)}: all machines must share the run's folder"
            )
        scorer.sums.merge(load_file(file_of(rank)))
        file_of(rank).unlink()


def _sum_up(made: list[Production]) -> dict[str, float]:
    """Totals of all processes of a call; seconds of the slowest."""
    return {
        "generated": sum(each.images for each in made),
        "computed": sum(each.computed for each in made),
        "seconds": max(each.seconds for each in made),
        "wall_seconds": max(each.wall_seconds for each in made),
    }


def _timings(calls: list[Mapping[str, float]]) -> dict[str, object]:
    """Seconds per image over all completed calls; rates of the last one that made images."""
    calls = [call for call in calls if call["computed"]]
    whole = {key: sum(call[key] for call in calls) for key in ("generated", "computed", "seconds")}
    if not calls:
        rates = ("sec_per_image", "images_per_s", "images_per_s_without_saving")
        return {**dict.fromkeys(rates), **whole}
    last = calls[-1]
    return {
        "sec_per_image": whole["seconds"] / whole["computed"],
        **whole,
        "images_per_s": last["computed"] / last["wall_seconds"],
        "images_per_s_without_saving": last["computed"] / last["seconds"],
    }


def _mixed(folder: RunFolder) -> dict[str, list[object]]:
    """Entries of MAY_DIFFER that differ between the calls on the folder, with their values."""
    calls = folder.calls()
    values = {name: list(dict.fromkeys(call.get(name) for call in calls)) for name in MAY_DIFFER}
    return {name: found for name, found in values.items() if len(found) > 1}
