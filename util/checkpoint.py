"""Training checkpoints, and weights to share; reading itself is in util/weights.py.

An official checkpoint is dict(model, model_ema, optimizer, epoch, scaler, args); evaluation uses
`model_ema`. Every file is written under a temporary name and then renamed. For sharing,
`python -m util.checkpoint convert SRC DST` writes one set of weights: DST.safetensors with DST.json
beside it, or a DST.pth that the original loads. It also turns l-DeTok's latent statistics, a
STATS.pkl, into a DST.safetensors.
"""

import argparse
import operator
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from util.data.latent_stats import convert_statistics
from util.errors import UserError, run_main
from util.files import read_json, sha256_of, write_json
from util.training.ema import EMA
from util.weights import (
    check_weights,
    find_checkpoint,
    load_state_dict_file,
    read_pickle,
    save_safetensors,
    weights_in,
    write_whole,
)

# Text flags that are shared; other text could be a path on the author's machine.
SHARED_WORDS = ("model", "tokenizer", "num_sampling_steps", "lr_schedule", "pos_init")
PICKLED_STATISTICS = (".pkl", ".pickle")
RESUMED: dict[str, tuple[type, ...]] = {
    "model": (Mapping,),
    "model_ema": (Mapping, Sequence),
    "optimizer": (Mapping,),
    "epoch": (object,),
}
PROGRESS = ("step", "step_in_epoch", "images_per_step")  # needed to resume


def save_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epochs_done: int,
    args: argparse.Namespace,
    progress: dict[str, int],
) -> None:
    """Write a training checkpoint in the official format, atomically.

    `epoch` is the last *complete* epoch (-1: none). The only key beyond the official six is
    `progress`, integers with which our trainer continues inside an epoch.
    """
    state = model.state_dict()
    # The original's loader refuses the empty state of a disabled scaler.
    active = scaler if scaler.is_enabled() else torch.amp.GradScaler("cpu")
    content = {
        "model": state,
        "model_ema": {**state, **ema.state_dict()},
        "optimizer": optimizer.state_dict(),
        "epoch": epochs_done - 1,
        "scaler": active.state_dict(),
        "args": args,
        "progress": progress,
    }
    write_whole(Path(path), lambda file: torch.save(content, file))


def restore_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, dict[str, int]]:
    """Load a checkpoint of `save_checkpoint` or of the original; returns (complete epochs, progress).

    `progress` is empty for a checkpoint of the original. UserError for a file without training
    state, or of another model.
    """
    path = find_checkpoint(path)
    content = _training_state(path)
    epoch = _whole(content["epoch"], least=-1)
    if epoch is None:
        raise _broken(path, "epoch", f"is {_kind_of(content['epoch'])}")
    progress = _progress(content, path)
    weights = weights_in(content, path, use_ema=False)
    averages = weights_in(content, path, use_ema=True, like=model)
    check_weights(model, weights, path)
    check_weights(model, averages, path)
    model.load_state_dict(weights)
    ema.load_state_dict(averages)
    steps = progress.get("step", epoch + 1) - progress.get("skipped", 0)
    _restore_optimizer(optimizer, content["optimizer"], path, trained=steps > 0)
    if scaler.is_enabled() and content.get("scaler"):
        try:
            scaler.load_state_dict(content["scaler"])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise _broken(path, "scaler", f"is incomplete ({error!r})") from error
    return epoch + 1, progress


def _training_state(path: Path) -> Mapping[str, Any]:
    """A whole checkpoint; UserError if an entry of RESUMED is missing or of another type."""
    content = read_pickle(path, mmap=False) if path.suffix != ".safetensors" else {}
    content = content if isinstance(content, Mapping) else {}
    for key, kind in RESUMED.items():
        if key not in content:
            raise UserError(
                f"{path} cannot be resumed: it has no '{key}', so it is not a training checkpoint"
            )
        if not isinstance(content[key], kind):
            raise _broken(path, key, f"is {_kind_of(content[key])}")
    return content


def _kind_of(value: object) -> str:
    return str(value) if value is None or isinstance(value, int) else f"a {type(value).__name__}"


def _whole(value: Any, least: int = 0) -> int | None:
    """A whole number of Python, numpy or torch; None for anything else, and below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return number if number >= least else None


def _broken(path: Path, entry: str, fault: str) -> UserError:
    return UserError(
        f"{path} cannot be resumed: its '{entry}' {fault}; use a whole training checkpoint, or "
        "remove --resume to start at step 0"
    )


def _progress(content: Mapping[str, object], path: Path) -> dict[str, int]:
    """The entry of our trainer, {} where the original wrote none. UserError if it is incomplete."""
    progress = content.get("progress", {})
    if not isinstance(progress, Mapping):
        raise _broken(path, "progress", f"is {_kind_of(progress)}")
    for name in PROGRESS if progress else ():
        if name not in progress:
            raise _broken(path, "progress", f"lacks '{name}'")
    numbers = {name: _whole(value) for name, value in progress.items()}
    for name, number in numbers.items():
        if number is None:
            raise _broken(path, "progress", f"has {_kind_of(progress[name])} as '{name}'")
    return {name: number for name, number in numbers.items() if number is not None}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, object], path: Path, trained: bool
) -> None:
    """Load Adam's moments. UserError unless all parameters have them, or none before the first step."""
    options = [{k for k, v in group.items() if v is not None} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _broken(path, "optimizer", f"is incomplete or another model's ({error!r})") from error
    for group, wanted in zip(optimizer.param_groups, options, strict=True):
        if missing := sorted(name for name in wanted if group.get(name) is None):
            raise _broken(path, "optimizer", f"lacks '{missing[0]}'")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fitting = sum(_fits(optimizer.state[p], p) for p in parameters if p in optimizer.state)
    if (trained or optimizer.state) and fitting < len(parameters):
        raise _broken(
            path, "optimizer", f"has the moments of {fitting} of {len(parameters)} parameters"
        )


def _fits(moments: object, parameter: Tensor) -> bool:
    if not isinstance(moments, Mapping) or not isinstance(moments.get("step"), Tensor | Real):
        return False
    averages = [moments.get(name) for name in ("exp_avg", "exp_avg_sq")]
    return all(isinstance(a, Tensor) and a.shape == parameter.shape for a in averages)


def _has_averages(path: Path, asked: bool | None) -> bool:
    """Whether the weights to convert are averaged. UserError if that is unknown or contradicts `asked`."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("weights")
        known = {"model_ema": True, "model": False}.get(stated or "")
        if known is not None and asked not in (None, known):
            raise UserError(f"{path} holds {stated}: remove {'--ema' if asked else '--no_ema'}")
        asked = known if asked is None else asked
        reason = "does not say whether its weights are averaged"
    else:
        reason = "may hold averaged weights (model_ema) and those of the last step (model)"
    if asked is None:
        raise UserError(f"{path} {reason}: say --ema or --no_ema")
    return asked


def _metadata(path: Path) -> dict[str, Any]:
    """Epoch, step and shareable flags of a checkpoint."""
    if path.suffix == ".safetensors":
        sidecar = path.with_suffix(".json")
        stated = read_json(sidecar, dict, "restore or remove it") if sidecar.is_file() else {}
        return {name: stated[name] for name in ("epoch", "step", "args") if name in stated}
    content = read_pickle(path)
    if not isinstance(content, Mapping):
        return {}
    found: dict[str, Any] = {}
    progress = content.get("progress")
    step = progress.get("step") if isinstance(progress, Mapping) else None
    for name, value in (("epoch", content.get("epoch")), ("step", step)):
        if isinstance(value, Integral):
            found[name] = int(value)
    if isinstance(content.get("args"), argparse.Namespace):
        found["args"] = {
            name: value
            for name, value in vars(content["args"]).items()
            if name in SHARED_WORDS or value is None or isinstance(value, (bool, int, float))
        }
    return found


def convert(
    source: str | Path, target: str | Path, use_ema: bool | None = None, overwrite: bool = False
) -> list[Path]:
    """Write one set of weights of a supported file for sharing; returns the files written.

    Args:
        source: as in `load_state_dict_file`.
        target: *.safetensors, with a *.json beside it that says which weights they are and of what
            model, or *.pth: the official dict without its training state.
        use_ema: True for the averaged weights, False for those of the last step; None if the file
            itself says which it holds.
        overwrite: replace files that exist.

    Raises:
        UserError: it is unknown which weights to take, an unknown kind of file, a file that exists.
    """
    source, target = find_checkpoint(source), Path(target)
    if target.suffix not in (".safetensors", ".pth"):
        raise UserError(f"{target} must end in .safetensors or .pth")
    shared = target.suffix == ".safetensors"
    targets = [target, target.with_suffix(".json")] if shared else [target]
    for path in targets:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: choose another name, or replace it by --overwrite")
    weights = load_state_dict_file(source, use_ema is True)
    use_ema = _has_averages(source, use_ema)
    metadata, key = _metadata(source), "model_ema" if use_ema else "model"
    if shared:
        save_safetensors(target, weights, {"weights": key})
        numbers = sum(tensor.numel() for tensor in weights.values())
        facts = {"weights": key, "parameters": numbers, "sha256": sha256_of(target)}
        write_json(targets[1], {**facts, **metadata})
    else:
        content: dict[str, object] = {"model": weights, key: weights}
        if "epoch" in metadata:
            content["epoch"] = metadata["epoch"]
        if "args" in metadata:
            content["args"] = argparse.Namespace(**metadata["args"])
        write_whole(target, lambda file: torch.save(content, file))
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m util.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write one set of weights of SRC as DST")
    add = command.add_argument
    add("source", metavar="SRC", help="checkpoint file or directory, or statistics (*.pkl)")
    add("target", metavar="DST", help="*.safetensors (and *.json) or *.pth")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_const", const=True, help="the averaged weights")
    which.add_argument(
        "--no_ema", action="store_const", const=False, dest="ema", help="those of the last step"
    )
    add("--overwrite", action="store_true", help="replace DST")
    add("--key", help="which statistics, where a *.pkl holds several")
    args = parser.parse_args()
    if Path(args.source).suffix in PICKLED_STATISTICS:
        print(f"wrote {convert_statistics(args.source, args.target, args.key, args.overwrite)}")
        return
    for path in convert(args.source, args.target, args.ema, args.overwrite):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
