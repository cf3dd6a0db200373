"""Weights on disk: the official `checkpoint-last.pth`, bare state dicts, safetensors; read safely.

An official checkpoint is dict(model, model_ema, optimizer, epoch, scaler, args); evaluation uses
`model_ema`. Nothing is unpickled but tensors and plain containers; every file is written under a
temporary name and then renamed. For sharing, `python -m util.checkpoint convert SRC DST` writes one set of
weights: DST.safetensors with DST.json beside it, or a DST.pth that the original loads.
"""

import argparse
import hashlib
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from util.download import name_of
from util.errors import UserError, run_main
from util.files import atomic_path, read_json, sha256_of, write_json
from util.training.ema import EMA

LAST = "checkpoint-last.pth"
# Flags whose values are words and still no paths; what is shared names no folder of its author's.
SHARED_WORDS = ("model", "tokenizer", "num_sampling_steps", "lr_schedule", "pos_init")


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, or the checkpoint inside a directory. UserError if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in (LAST, "model.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds neither {LAST} nor model.safetensors")
    raise UserError(
        f"no checkpoint at {path}: get the published one with `python -m util.download {name_of(path)}` "
        "or give --resume a file that exists"
    )


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(256).lstrip()
    if not head:
        raise UserError(f"{path} is empty: download it again")
    if head[:1] == b"<":
        raise UserError(f"{path} is an HTML page, not a checkpoint: download it again")


def read_pickle(path: Path, mmap: bool = True) -> object:
    """Tensors and plain containers of a .pth file, on the CPU; nothing else is ever unpickled.

    With mmap the tensors are views of the file, which must not be overwritten in place meanwhile.
    """
    _refuse_foreign(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a checkpoint that can be read safely") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path} is truncated, damaged or not a PyTorch file") from error


def _read_safetensors(path: Path, use_ema: bool) -> dict[str, Tensor]:
    _refuse_foreign(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated, damaged or not a safetensors file") from error
    if use_ema and metadata.get("weights") == "model":
        raise UserError(f"{path} holds the weights of the last step, not the averaged ones (EMA)")
    return weights


def load_state_dict_file(path: str | Path, use_ema: bool = True) -> dict[str, Tensor]:
    """Weights by name from any supported file, on the CPU.

    Args:
        path: a directory with checkpoint-last.pth or model.safetensors, or a .pth, .pt, .ckpt or
            .safetensors file. A bare state dict is taken as it is.
        use_ema: from a training checkpoint take `model_ema` (evaluation), else `model`.

    Raises:
        UserError: missing, foreign, truncated file, or no averaged weights although asked for.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, use_ema)
    content = read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        key = "model_ema" if use_ema else "model"
        if key not in content:
            raise UserError(
                f"{path} has no averaged weights (model_ema); ask for the plain ones instead"
            )
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no weights by name")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds no weights by name: '{name}' is a {type(value).__name__}"
            )
    return dict(content)


def describe(path: str | Path, use_ema: bool) -> str:
    """Which weights these are: the file's name, the first digits of its sha256, averaged or not."""
    file = find_checkpoint(path)
    return f"{file.name} {sha256_of(file)[:16]} {'model_ema' if use_ema else 'model'}"


def digest_of(model: nn.Module) -> str:
    """First 16 digits of the sha256 of a model's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError naming the first name or shape in which `weights` differ from those of `model`."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise UserError(f"{source} lacks '{name}', which the model has: it is of another model")
        if weights[name].shape != tensor.shape:
            theirs, ours = tuple(weights[name].shape), tuple(tensor.shape)
            raise UserError(
                f"'{name}' is {theirs} in {source} but {ours} in the model: check the model's flags"
            )
    for name in weights:
        if name not in own:
            raise UserError(f"{source} has '{name}', which the model lacks: it is of another model")


def load_into(
    model: nn.Module, path: str | Path, use_ema: bool = True, surplus: Collection[str] = ()
) -> None:
    """Copy the weights of a file into `model`; UserError unless all names and shapes agree.

    `surplus`: names that the file may have besides.
    """
    weights = load_state_dict_file(path, use_ema)
    for name in surplus:
        weights.pop(name, None)
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def _write(path: Path, save: Callable[[BinaryIO], None]) -> None:
    """Atomically, and on the disk before the old file goes. UserError if it cannot be written."""
    with atomic_path(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            try:
                save(file)
            except RuntimeError as error:  # torch's writer says this when the file refuses
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())


def save_safetensors(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write weights by name as safetensors, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state_dict.items()}
    # save_file would make a file that only its owner can read
    _write(Path(path), lambda file: file.write(save(tensors, metadata)))


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

    `epoch` is the last *complete* epoch (-1: none). The one key beyond the official six is
    `progress`, plain integers by which our trainer goes on inside an epoch.
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
    _write(Path(path), lambda file: torch.save(content, file))


def restore_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, dict[str, int]]:
    """Load what `save_checkpoint` or the original wrote; returns (complete epochs, progress).

    `progress` is empty for a checkpoint of the original. UserError for a file without training
    state, or of another model.
    """
    path = find_checkpoint(path)
    content = read_pickle(path, mmap=False) if path.suffix != ".safetensors" else {}
    for key in ("model", "model_ema", "optimizer", "epoch"):
        if not isinstance(content, Mapping) or key not in content:
            raise UserError(
                f"{path} cannot be resumed: it has no '{key}', so it is no training checkpoint"
            )
    check_weights(model, content["model"], path)
    check_weights(model, content["model_ema"], path)
    model.load_state_dict(content["model"])
    ema.load_state_dict(content["model_ema"])
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: its optimizer state is of another model ({error})") from error
    if scaler.is_enabled() and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    return content["epoch"] + 1, dict(content.get("progress", {}))


def _has_averages(path: Path, asked: bool | None) -> bool:
    """Whether the weights to convert are averaged ones. UserError if nobody says, or both disagree."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            stated = (file.metadata() or {}).get("weights")
        known = {"model_ema": True, "model": False}.get(stated)
        if known is not None and asked not in (None, known):
            raise UserError(f"{path} holds {stated}: leave out {'--ema' if asked else '--no_ema'}")
        asked = known if asked is None else asked
        reason = "does not say whether its weights are averaged"
    else:
        reason = "may hold averaged weights (model_ema) and those of the last step (model)"
    if asked is None:
        raise UserError(f"{path} {reason}: say --ema or --no_ema")
    return asked


def _about(path: Path) -> dict[str, object]:
    """What a checkpoint tells of its weights besides them: epoch, step and the numbers of its flags."""
    if path.suffix == ".safetensors":
        sidecar = path.with_suffix(".json")
        found = read_json(sidecar, dict, "restore or remove it") if sidecar.is_file() else {}
        return {name: found[name] for name in ("epoch", "step", "args") if name in found}
    content = read_pickle(path)
    about = {}
    if isinstance(content.get("epoch"), int):
        about["epoch"] = content["epoch"]
    if "progress" in content:
        about["step"] = content["progress"]["step"]
    if isinstance(content.get("args"), argparse.Namespace):
        about["args"] = {
            name: value
            for name, value in vars(content["args"]).items()
            if name in SHARED_WORDS or value is None or isinstance(value, (bool, int, float))
        }
    return about


def convert(
    source: str | Path, target: str | Path, use_ema: bool | None = None, overwrite: bool = False
) -> list[Path]:
    """Write one set of weights of a supported file for sharing; returns the files written.

    Args:
        source: as in `load_state_dict_file`.
        target: *.safetensors, with a *.json beside it that says which weights they are and of what
            model, or *.pth: the official dict without its training state, `model` being the same.
        use_ema: True for the averaged weights, False for those of the last step. None is enough
            where the file itself says which it holds.
        overwrite: replace files that exist.

    Raises:
        UserError: nothing says which weights are meant, an unknown kind of file, a file that exists.
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
    about, key = _about(source), "model_ema" if use_ema else "model"
    if shared:
        save_safetensors(target, weights, {"weights": key})
        numbers = sum(tensor.numel() for tensor in weights.values())
        digest = sha256_of(target)
        write_json(targets[1], {"weights": key, "parameters": numbers, "sha256": digest, **about})
    else:
        content = {"model": weights, key: weights}
        if "epoch" in about:
            content["epoch"] = about["epoch"]
        if "args" in about:
            content["args"] = argparse.Namespace(**about["args"])
        _write(target, lambda file: torch.save(content, file))
    return targets


def main() -> None:
    """Command line of `python -m util.checkpoint`."""
    parser = argparse.ArgumentParser(prog="python -m util.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write one set of weights of SRC as DST")
    command.add_argument("source", metavar="SRC", help="checkpoint file or directory")
    command.add_argument("target", metavar="DST", help="*.safetensors (and *.json) or *.pth")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_const", const=True, help="the averaged weights")
    which.add_argument(
        "--no_ema", action="store_const", const=False, dest="ema", help="those of the last step"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DST")
    args = parser.parse_args()
    for path in convert(args.source, args.target, args.ema, args.overwrite):
        print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
