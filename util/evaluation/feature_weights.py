"""Files of the feature extractors' weights."""

import os
from pathlib import Path
from urllib.error import URLError

import torch

from util.download import read_manifest
from util.errors import UserError
from util.files import beside_code
from util.weights import read_pickle

SHAPES = "pretrained_models/mar_tiny/classifier.safetensors"
PROMPTS = "pretrained_models/janus_tiny/prompt_classifier.safetensors"
_INCEPTION_HASH = "6726825d"  # first digits of the sha256, stated by the file's name


def inception_weights(path: str | None) -> str:
    """The given file, else torch.hub's copy, downloaded if missing; never a pickle that runs code.

    torch-fidelity unpickles the file as it is, so it is read here first with weights_only.
    """
    if path is None:
        item = read_manifest()["inception"]
        path = str(item.target)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                torch.hub.download_url_to_file(item.url, path, _INCEPTION_HASH)
            except (URLError, TimeoutError, ConnectionError) as error:
                raise UserError(
                    f"Inception's weights {path} are missing and cannot be downloaded ({error}); "
                    "run `python -m util.download inception` where there is a network"
                ) from error
    elif not os.path.isfile(path):
        raise UserError(
            f"Inception's weights {path} are missing; `python -m util.download inception` gets them"
        )
    read_pickle(Path(path))
    return path


def bundled_weights(file: str, path: str | None) -> str:
    """The given path of a classifier, else its bundled `file`. UserError if it is missing."""
    path = path or beside_code(file)
    if not os.path.isfile(path):
        raise UserError(f"the classifier {path} is missing; the repository has it as {file}")
    return path
