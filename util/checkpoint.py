"""Weights on disk: the official `checkpoint-last.pth`, bare state dicts, safetensors; read safely.

An official checkpoint is dict(model, model_ema, optimizer, epoch, scaler, args); evaluation uses
`model_ema`. Nothing is unpickled but tensors and plain containers; every file is written under a
temporary name and then renamed. `python -m util.checkpoint convert SRC DST` makes safetensors.
"""

import argparse
import hashlib
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from util.download import name_of
from util.ema import EMA
from util.errors import UserError, run_main
from util.files import atomic_path, sha256_of

LAST = "checkpoint-last.pth"


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


def _write(path: Path, save: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save(temporary)


def save_safetensors(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write weights by name as safetensors, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state_dict.items()}
    # save_file would make a file that only its owner can read
    _write(Path(path), lambda temporary: temporary.write_bytes(save(tensors, metadata)))


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
    _write(Path(path), lambda temporary: torch.save(content, temporary))


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


def convert(source: str | Path, target: str | Path, use_ema: bool = True) -> None:
    """Write the weights of any supported file as safetensors; its metadata say which they are."""
    weights = load_state_dict_file(source, use_ema)
    save_safetensors(target, weights, {"weights": "model_ema" if use_ema else "model"})


def main() -> None:
    """Command line of `python -m util.checkpoint`."""
    parser = argparse.ArgumentParser(prog="python -m util.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write the weights of SRC as safetensors DST")
    command.add_argument("source", metavar="SRC", help="checkpoint file or directory")
    command.add_argument("target", metavar="DST", help="file to write, *.safetensors")
    command.add_argument(
        "--no_ema", action="store_true", help="weights of the last step, not averaged"
    )
    args = parser.parse_args()
    convert(args.source, args.target, use_ema=not args.no_ema)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    run_main(main)
