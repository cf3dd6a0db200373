"""Weights on disk: the project's only reader, which is safe, and the writer of safetensors.

A file holds weights by name: a state dict, or a dict with one under a key of AVERAGED or PLAIN. The
reader unpickles only tensors, plain containers, numpy's scalars and arrays, and `argparse.Namespace`,
in which the official checkpoints keep their flags.
"""

import argparse
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from util.download import name_of
from util.errors import WeightsError
from util.files import atomic_path, hub_weights, sha256_of

LAST = "checkpoint-last.pth"
AVERAGES = "model_ema"
AVERAGED = (AVERAGES, "ema", "state_dict_ema")  # MAR and l-DeTok, DiT, timm
# MAR and l-DeTok, DeepSpeed, Lightning and timm, PyTorch's tutorials
PLAIN = ("model", "module", "state_dict", "model_state_dict")
PREFIXES = ("module.", "model.")  # DistributedDataParallel, Lightning
COUNT = "n_averaged"  # torch's AveragedModel counts its updates in it
COMPILED = "_orig_mod."  # torch.compile; in the middle of a name where only a part is compiled


def find_checkpoint(path: str | Path) -> Path:
    """The file itself, or the checkpoint inside a directory. WeightsError if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in (LAST, "model.safetensors"):
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{path} holds neither {LAST} nor model.safetensors")
    raise WeightsError(
        f"no checkpoint at {path}: get the published one with `python -m util.download {name_of(path)}` "
        "or give --resume a file that exists"
    )


def _refuse_foreign(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(256).lstrip()
    if not head:
        raise WeightsError(f"{path} is empty: download it again")
    if head[:1] == b"<":
        raise WeightsError(f"{path} is an HTML page, not a checkpoint: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull`")


def _alias(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    """The function under the name that another numpy version pickles it by."""

    def call(*args: object) -> Any:
        return function(*args)

    call.__module__ = module
    call.__name__ = call.__qualname__ = function.__name__
    return call


def _safe_globals() -> list[Any]:
    """Names allowed beyond torch's own list: flags, numpy's scalars and arrays of numbers."""
    # numpy's own way to unpickle a scalar and an array, private functions in every version
    makers: list[Any] = [value.__reduce__()[0] for value in (np.int64(0), np.zeros(0))]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1, numpy 2
    numbers = [type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"]
    aliases = [_alias(maker, module) for maker in makers for module in modules]
    return [argparse.Namespace, np.dtype, np.ndarray, *numbers, *aliases]


SAFE_GLOBALS = _safe_globals()


def read_pickle(path: Path, mmap: bool = True) -> Any:
    """Tensors and plain containers of a .pth file, on the CPU; nothing else is unpickled.

    With mmap the tensors are views of the file, which must not be overwritten in place meanwhile.
    """
    _refuse_foreign(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        registered = torch.serialization.get_safe_globals()  # the block's end would remove them
        with torch.serialization.safe_globals([x for x in SAFE_GLOBALS if x not in registered]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # a damaged pickle raises almost anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and (found or is_zip):
            raise WeightsError(
                f"{path} cannot be read safely: it holds {found[1] if found else 'more than tensors'}, "
                "and unpickling that could run any code; save its weights alone, as "
                "torch.save(model.state_dict(), FILE) does"
            ) from error
        raise WeightsError(f"{path} is truncated, damaged or not a PyTorch file") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and metadata of a safetensors file. WeightsError if damaged."""
    path = Path(path)
    _refuse_foreign(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged, truncated or not a safetensors file") from error


def read_hub_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model's folder as the Hugging Face Hub has it, under their names there.

    UserError if the folder holds no weights, or a file is damaged.
    """
    weights: dict[str, Tensor] = {}
    for path in hub_weights(Path(folder)):
        safe = path.suffix == ".safetensors"
        weights |= read_safetensors(path)[0] if safe else _named(read_pickle(path), path)
    return weights


def load_state_dict_file(
    path: str | Path,
    use_ema: bool | None = True,
    *,
    like: nn.Module | None = None,
    surplus: Collection[str] = (),
) -> dict[str, Tensor]:
    """Weights by name from any supported file, on the CPU, without the prefixes of wrappers.

    Args:
        path: a directory with checkpoint-last.pth or model.safetensors, or a .pth, .pt, .ckpt or
            .safetensors file. A state dict that is bare, or alone under another key than `model`, is
            taken as it is.
        use_ema: from a training checkpoint take the averages (evaluation), else the weights of the
            last step; None takes the averages where the file has some.
        like: the model of the weights; it names averages that are stored as a list.
        surplus: beginnings of names that are left out.

    Raises:
        WeightsError: missing, foreign, truncated file, or no averaged weights although asked for.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        if use_ema and metadata.get("weights") == "model":
            raise WeightsError(f"{path} holds weights of the last step, not averaged ones (EMA)")
        weights = _unwrap(tensors)
    else:
        weights = weights_in(read_pickle(path), path, use_ema, like)
    return {name: w for name, w in weights.items() if not name.startswith(tuple(surplus))}


def weights_in(
    content: object, source: str | Path, use_ema: bool | None, like: nn.Module | None = None
) -> dict[str, Tensor]:
    """The weights inside an unpickled checkpoint, chosen and named as in `load_state_dict_file`."""
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source} holds no weights by name")
    averages = next((content[key] for key in AVERAGED if content.get(key) is not None), None)
    plain = next((content[key] for key in PLAIN if isinstance(content.get(key), Mapping)), None)
    if use_ema is not False and isinstance(averages, Mapping):
        return _by_name(averages, source)
    if use_ema is not False and isinstance(averages, Sequence):
        named = None if plain is None else _by_name(plain, source)
        return _name_averages(averages, source, named, like)
    if use_ema and plain is not None and plain is content.get("model"):
        raise WeightsError(
            f"{source} has no averaged weights ({AVERAGES}): give --no_ema for those of the last step"
        )
    if plain is None and isinstance(averages, Mapping | Sequence):
        raise WeightsError(f"{source} holds averaged weights ({AVERAGES}) alone: remove --no_ema")
    return _by_name(content if plain is None else plain, source)


def _by_name(weights: Mapping[Any, Any], source: str | Path) -> dict[str, Tensor]:
    return _unwrap(_named(weights, source))


def _named(weights: object, source: str | Path) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping) or not weights:
        raise WeightsError(f"{source} holds no weights by name")
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            value = torch.from_numpy(value)
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{source} holds no weights by name: '{name}' is a {type(value).__name__}"
            )
        tensors[name] = value
    return tensors


def _unwrap(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that the model itself has; prefixes of wrappers are removed where all names have them."""
    weights = {name: tensor for name, tensor in weights.items() if name != COUNT}
    names = [name.replace(COMPILED, "") for name in weights]
    while names and any(all(name.startswith(prefix) for name in names) for prefix in PREFIXES):
        names = [name.partition(".")[2] for name in names]
    if len(set(names)) < len(names):  # two weights of one name: check_weights reports it
        names = list(weights)
    return dict(zip(names, weights.values(), strict=True))


def _name_averages(
    averages: Sequence[Any],
    source: str | Path,
    plain: Mapping[str, Tensor] | None,
    like: nn.Module | None,
) -> dict[str, Tensor]:
    """Averages stored as a list, in the parameter order of the code that wrote them."""
    for names in _orders(plain, like):
        if len(names) == len(averages) and all(
            isinstance(average, Tensor) and average.shape == parameter.shape
            for average, parameter in zip(averages, names.values(), strict=True)
        ):
            return dict(zip(names, averages, strict=True))
    raise WeightsError(
        f"{source} has its averages ({AVERAGES}) as a list of {len(averages)} without names, which "
        "does not fit the model: check the model's flags"
    )


def _orders(
    plain: Mapping[str, Tensor] | None, like: nn.Module | None
) -> Iterator[Mapping[str, Tensor]]:
    """Names and shapes in every known order: the file's own, the model's, and l-DeTok's."""
    if plain is not None:
        yield plain
    if like is not None:
        own: dict[str, Tensor] = dict(like.named_parameters())
        yield own
        # l-DeTok's blocks register norm1 and norm2 before the attention, timm's and ours behind it
        index = {name: i for i, name in enumerate(own)}

        def place(name: str) -> int:
            block, found, _ = name.partition(".norm2.")
            return index.get(f"{block}.norm1.bias", index[name]) if found else index[name]

        yield {name: own[name] for name in sorted(own, key=place)}


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """WeightsError naming the first name, shape or kind of numbers in which `weights` do not fit."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            prefixes = [other.removesuffix(name) for other in weights if other.endswith(f".{name}")]
            parts = [part for part in prefixes if all(part + each in weights for each in own)]
            if parts:
                raise WeightsError(
                    f"{source} has the weights of the model as '{parts[0]}*' beside others: save that "
                    "part alone, under the model's own names"
                )
            raise WeightsError(f"{source} lacks '{name}': it is of another model")
        if weights[name].shape != tensor.shape:
            theirs, ours = tuple(weights[name].shape), tuple(tensor.shape)
            raise WeightsError(
                f"'{name}' is {theirs} in {source} but {ours} in the model: check the model's flags"
            )
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise WeightsError(
                f"'{name}' is {kind} in {source}: quantised weights are not supported, save them as floats"
            )
    for name in weights:
        if name not in own:
            raise WeightsError(f"{source} has a surplus '{name}': it is of another model")


def load_into(
    model: nn.Module, path: str | Path, use_ema: bool | None = True, surplus: Collection[str] = ()
) -> None:
    """Copy the weights of a file into `model`; WeightsError unless they fit (check_weights).

    Arguments as in `load_state_dict_file`.
    """
    weights = load_state_dict_file(path, use_ema, like=model, surplus=surplus)
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def describe(path: str | Path, use_ema: bool) -> str:
    """Which weights these are: the file's name, the first digits of its sha256, averaged or not."""
    file = find_checkpoint(path)
    return f"{file.name} {sha256_of(file)[:16]} {AVERAGES if use_ema else 'model'}"


def digest_of(model: nn.Module) -> str:
    """First 16 digits of the sha256 of a model's weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_whole(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically and flush it to disk before it replaces the old one. UserError: cannot."""
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
    write_whole(Path(path), lambda file: file.write(save(tensors, metadata)))
