"""What image i of a run shows: a class label, or a prompt."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from util.errors import UserError

Condition = int | str


def class_labels(conditions: Sequence[Condition]) -> list[int] | None:
    """The conditions if they are class labels, None if they are prompts."""
    labels = [condition for condition in conditions if not isinstance(condition, str)]
    return labels if len(labels) == len(conditions) else None


class Conditions(Protocol):
    """The conditions of a run."""

    def of(self, indices: Iterable[int], num_images: int) -> Sequence[Condition]:
        """Those of images `indices` in a run of `num_images`."""

    def describe(self) -> Mapping[str, object]:
        """Entries of the manifest's configuration; a different description is a different run."""


@dataclass(frozen=True)
class ClassLabels:
    """Classes in order, equally many images of each: image i has label i * classes // images."""

    class_num: int

    def of(self, indices: Iterable[int], num_images: int) -> list[int]:
        last = num_images - 1  # padding of the last batch repeats the last class
        return [image_label(min(i, last), num_images, self.class_num) for i in indices]

    def describe(self) -> dict[str, object]:
        return {"class_num": self.class_num}


def image_label(index: int, num_images: int, class_num: int) -> int:
    """Class of image `index` in a run of num_images."""
    return index * class_num // num_images


@dataclass(frozen=True)
class Prompts:
    """Image i shows prompt i; a run longer than the list starts again from the first prompt."""

    texts: tuple[str, ...]
    source: str

    def of(self, indices: Iterable[int], num_images: int) -> list[str]:
        return [self.texts[i % len(self.texts)] for i in indices]

    def describe(self) -> dict[str, object]:
        digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()
        return {"prompts": f"{self.source} {len(self.texts)} {digest[:16]}"}

    @classmethod
    def from_file(cls, path: str | Path) -> "Prompts":
        """Read a text file (one prompt per line), JSON lines ("prompt" or "text"), or COCO captions.

        A COCO file gives the first caption of each image, in the order of image ids. Empty lines and
        captions are skipped. UserError for another kind of file, or one without prompts.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompts {path} cannot be read ({error}): give a text file"
            ) from error
        kind = path.suffix.lower()
        if kind == ".json":
            texts = _coco_captions(path, text)
        elif kind in (".jsonl", ".ndjson"):
            texts = [_of_line(path, number, line) for number, line in _lines(text)]
        else:
            texts = [line for _, line in _lines(text)]
            if texts and _is_object(texts[0]):
                raise UserError(f"--prompts {path} holds JSON lines: let its name end in .jsonl")
        if not texts:
            raise UserError(f"--prompts {path} holds no prompt: write one per line")
        return cls(tuple(texts), path.name)


def _lines(text: str) -> list[tuple[int, str]]:
    numbered = enumerate(text.split("\n"), start=1)  # splitlines would cut at U+2028, too
    return [(number, line.strip()) for number, line in numbered if line.strip()]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_line(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
        prompt = _stripped(entry.get("prompt", entry.get("text")))
        if not prompt:
            raise ValueError("it is empty")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}, line {number}, is not a JSON object with a "prompt" ({error})'
        ) from error
    return prompt


def _stripped(text: object) -> str:
    """A prompt of a JSON document. ValueError for what is no text, or has half a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError("no text")
    text.encode()
    return text.strip()


def _coco_captions(path: Path, text: str) -> list[str]:
    try:
        annotations: list[dict[str, Any]] = json.loads(text)["annotations"]
        first: dict[int, tuple[int, str]] = {}
        for entry in annotations:
            image, number = int(entry["image_id"]), int(entry["id"])
            caption = _stripped(entry["caption"])
            if caption and (image not in first or number < first[image][0]):
                first[image] = number, caption
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"--prompts {path} is not a COCO captions file ({type(error).__name__}: {error}): give "
            "one, or a text file with a prompt per line"
        ) from error
    return [first[image][1] for image in sorted(first)]
