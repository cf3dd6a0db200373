"""The folder of one evaluation: images named by their index, one configuration, one result.

    DIR/images/00000.png ...   DIR/manifest.json   DIR/sheet.png   DIR/results.json   DIR/samples.npz

The manifest is written before the first image. It holds the configuration, which decides the images,
and every call that worked on them: arguments, commit, torch, device. A folder refuses another
configuration, so that the same command resumes and a different one cannot mix its images in.
"""

import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.errors import UserError
from util.evaluation.conditions import Condition, class_labels
from util.files import atomic_path, read_json, write_json
from util.images import (
    check_numbered,
    contact_sheet,
    is_complete_png,
    list_images,
    png_name,
    read_image,
    save_png,
)

Json = Mapping[str, Any]

MANIFEST = "manifest.json"
# Entries of a call that change images only by rounding; a change is noted on stderr.
MAY_DIFFER = (
    *("commit", "torch", "device_name", "threads"),
    *("compile", "cuda_graphs", "eval_bsz", "vae_bsz"),
)
_MADE = ("generated", "computed", "seconds", "wall_seconds")


class RunFolder:
    """One evaluation's folder; creates nothing before `open`."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.images = self.path / "images"

    def manifest(self) -> dict[str, Any]:
        """{"config": {...}, "calls": [...]}, or {} where there is none. UserError if it is damaged."""
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        remedy = "restore it, or delete the folder and start again"
        found = read_json(path, dict, remedy)
        calls = found.get("calls")
        if not isinstance(found.get("config"), dict) or not isinstance(calls, list) or not calls:
            raise UserError(f"{path} cannot be read (it lacks configuration or calls): {remedy}")
        if not all(isinstance(call, dict) and _is_whole(call) for call in calls):
            raise UserError(f"{path} cannot be read (a call is not whole): {remedy}")
        return found

    def conflict(self, config: Json) -> str | None:
        """Why a run of `config` cannot continue here, as half a sentence, or None."""
        manifest = self.manifest()
        if not manifest:
            count = len(list_images(self.images)) if self.images.is_dir() else 0
            return f"holds {count} images, but no {MANIFEST} says what made them" if count else None
        config, found = json.loads(json.dumps(config)), manifest["config"]  # as both are read back
        for key in {**found, **config}:
            if found.get(key) != config.get(key):
                return f"holds a run with {key} {found.get(key)!r}, not {config.get(key)!r}"
        return None

    def check(self, config: Json, num_images: int, overwrite: bool = False) -> bool:
        """Whether there are images of another configuration, which `overwrite` discards.

        UserError: another configuration without `overwrite`, or images that are not of this run.
        """
        images = list_images(self.images) if self.images.is_dir() else []
        check_numbered(images)
        conflict = self.conflict(config)
        if conflict and not overwrite:
            raise UserError(
                f"{self.path} {conflict}: choose another --output_dir or discard it by --overwrite"
            )
        if not conflict:
            check_numbered(images, below=num_images)
        return conflict is not None

    def open(self, config: Json, call: Json, num_images: int, overwrite: bool = False) -> list[str]:
        """Create the folder, or continue in it with one more call, as `check` allows.

        Returns what of MAY_DIFFER has changed since the last call, as "eval_bsz 64 -> 32".
        UserError also if the folder cannot be written.
        """
        try:
            if self.check(config, num_images, overwrite):
                self._discard()
            self.results()  # damaged ones are named before the first image
            calls = self.calls()
            self.images.mkdir(parents=True, exist_ok=True)
            write_json(self.path / MANIFEST, {"config": config, "calls": [*calls, call]})
        except OSError as error:
            raise UserError(f"cannot use the run folder {self.path} ({error})") from error
        if not calls:
            return []
        last = calls[-1]
        return [
            f"{k} {last.get(k)} -> {call.get(k)}" for k in MAY_DIFFER if last.get(k) != call.get(k)
        ]

    def calls(self) -> list[Json]:
        """The calls on this folder, oldest first."""
        return self.manifest().get("calls", [])

    def amend_call(self, more: Json) -> None:
        """Add entries to the last call of the manifest."""
        manifest = self.manifest()
        manifest["calls"][-1] |= more
        write_json(self.path / MANIFEST, manifest)

    def _discard(self) -> None:
        """Delete the files that this class writes, and no others."""
        self.delete_images()
        for name in ("results.json", "sheet.png", "samples.npz", MANIFEST):
            (self.path / name).unlink(missing_ok=True)

    def delete_images(self) -> None:
        for file in self.images.glob("*.png"):
            if file.stem.isdigit():
                file.unlink(missing_ok=True)

    def image(self, index: int) -> Path:
        """Path of image `index`."""
        return self.images / png_name(index)

    def results(self) -> dict[str, Any]:
        """The results of an earlier call, or {}. UserError if they are damaged."""
        path = self.path / "results.json"
        return read_json(path, dict, "delete it, it is made again") if path.exists() else {}

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of the indices that have no complete PNG yet."""
        return [i for i in indices if not is_complete_png(self.image(i))]

    def sweep(self) -> None:
        """Delete temporary files of killed processes; call it only while no process writes."""
        for file in (*self.path.glob(".*.part"), *self.images.glob(".*.part")):
            file.unlink(missing_ok=True)

    def write_sheet(self, num_images: int, rows: int = 8, columns: int = 10) -> None:
        """Contact sheet of some images."""
        sheet = contact_sheet(self.spread(num_images, rows * columns), columns)
        save_png(self.path / "sheet.png", sheet)

    def spread(self, num_images: int, count: int) -> np.ndarray:
        """At most `count` images (N, H, W, 3) spread evenly over the run, and so over its classes."""
        count = min(num_images, count)
        chosen = [self.image(i * num_images // count) for i in range(count)]
        return np.stack([read_image(path) for path in chosen])

    def finished(self, weights: str) -> bool:
        """Whether the folder holds results of these weights."""
        return bool(self.results()) and self.manifest()["config"].get("weights") == weights

    def drop_images(self) -> None:
        """Delete the numbered images and record that in the results."""
        self.delete_images()
        with suppress(OSError):  # it may hold other files
            self.images.rmdir()
        write_json(self.path / "results.json", {**self.results(), "images_dir": None})

    def write_npz(self, conditions: Sequence[Condition]) -> Path:
        """samples.npz as ADM's evaluator reads it, image by image: memory does not grow with N.

        arr_0 (N, H, W, 3) uint8 in the order of the indices; arr_1 (N,) int64 labels, if the images
        have any (guided-diffusion, scripts/image_sample.py).
        """
        path, labels = self.path / "samples.npz", class_labels(conditions)
        shape = (len(conditions), *read_image(self.image(0)).shape)
        with (
            atomic_path(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(len(conditions)):
                    file.write(read_image(self.image(index)).tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
        return path


def _is_whole(call: Json) -> bool:
    """Whether a call has its arguments and, unless it was interrupted, its totals."""
    made = call.get("made", dict.fromkeys(_MADE, 0))
    return (
        isinstance(call.get("arguments", {}), dict)
        and isinstance(made, dict)
        and all(isinstance(made.get(name), (int, float)) for name in _MADE)
    )


def provenance() -> dict[str, object]:
    """Origin of a number: command line, commit (with + if files changed since), torch version.

    An unknown commit is None, and commit_unknown gives the reason.
    """
    commit, reason = _commit()
    unknown = {} if commit else {"commit_unknown": reason}
    origin = {"command": shlex.join(sys.argv), "commit": commit, **unknown}
    return {**origin, "torch": torch.__version__}


def _commit() -> tuple[str | None, str]:
    """The commit of the code, or None and the reason.

    Only of a repository that tracks this file: an archive may be unpacked inside another one.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    # A hook's GIT_DIR would name the repository it runs for.
    names = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")
    env = {name: value for name, value in os.environ.items() if name not in names}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": env}
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], **options)
        describe = [*git, "describe", "--always", "--dirty=+", "--match="]
        return subprocess.run(describe, **options).stdout.strip(), ""
    except OSError as error:
        return None, f"git cannot be run ({error.strerror})"
    except subprocess.CalledProcessError as error:
        if error.returncode == 1:
            return None, "the git repository around the code does not track it"
        return None, (error.stderr.strip() or "git failed").splitlines()[0]
