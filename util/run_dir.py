"""The folder of one evaluation: images named by their index, one configuration, one result.

    DIR/images/00000.png ...   DIR/config.json   DIR/sheet.png   DIR/results.json

The configuration is written before the first image. A folder refuses another configuration, so that the
same command resumes and a different one cannot mix its images in.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from util.errors import UserError
from util.files import write_json
from util.images import contact_sheet, is_complete_png, png_name, read_image, save_png

Json = Mapping[str, object]


class RunDir:
    """One evaluation's folder; creates nothing before `open`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.images = self.path / "images"

    def open(self, config: Json, overwrite: bool = False) -> None:
        """Create the folder, or check that it holds this configuration.

        `overwrite` discards the images of another one. UserError: another configuration, or a folder that
        cannot be written.
        """
        stored = self.path / "config.json"
        config = json.loads(json.dumps(config))  # as it will be read back
        try:
            if stored.exists():
                found = json.loads(stored.read_text())
                changed = [k for k in {**found, **config} if found.get(k) != config.get(k)]
                if changed and not overwrite:
                    key = changed[0]
                    raise UserError(
                        f"{self.path} holds a run with {key} {found.get(key)!r}, this one has "
                        f"{config.get(key)!r}: choose another --output_dir or discard it by --overwrite"
                    )
                if changed:
                    self._discard()
            self.images.mkdir(parents=True, exist_ok=True)
            write_json(stored, config)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot use the run folder {self.path} ({error})") from error

    def _discard(self) -> None:
        """Delete what this project put there, and nothing else."""
        for file in self.images.glob("*.png"):
            if file.stem.isdigit():
                file.unlink()
        for name in ("results.json", "sheet.png", "config.json"):
            (self.path / name).unlink(missing_ok=True)

    def image(self, index: int) -> Path:
        """Where image `index` lies."""
        return self.images / png_name(index)

    def results(self) -> dict[str, object]:
        """The results of an earlier call, or {}."""
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def missing(self, num_images: int) -> list[int]:
        """Indices below num_images that have no complete PNG yet."""
        return [i for i in range(num_images) if not is_complete_png(self.image(i))]

    def write_sheet(self, num_images: int, rows: int = 8, columns: int = 10) -> None:
        """Contact sheet of images spread evenly over the run, and so over its classes."""
        count = min(num_images, rows * columns)
        chosen = [self.image(i * num_images // count) for i in range(count)]
        sheet = contact_sheet(np.stack([read_image(path) for path in chosen]), columns)
        save_png(self.path / "sheet.png", sheet)


def provenance() -> dict[str, object]:
    """What a number travels with: command line, commit (with + if files changed since), torch."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--match="]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # an unpacked archive, or no git here
    return {"command": shlex.join(sys.argv), "commit": commit, "torch": torch.__version__}
