"""Fetch the published files: `python -m util.download vae mar_base fid_stats inception`.

pretrained_models/manifest.json says where each file comes from, where it goes (relative to the
working directory), its length and its digest. A download goes to PATH.part, continues after a broken
connection or a restart, and gets its final name only when length and digest are right.
"""

import argparse
import json
import os
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from types import ModuleType
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

from tqdm import tqdm

from util.errors import UserError, run_main
from util.files import hub_weights, sha256_of

MANIFEST = Path(__file__).parent.parent / "pretrained_models" / "manifest.json"
HUB = "https://huggingface.co/"
TORCH_HUB = "$TORCH_HUB/"  # start of a path below torch.hub.get_dir()
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")  # of a repository: no pickles
CHUNK = 1 << 20
TRY_LATER = (408, 425, 429)  # RFC 9110 and 6585: the same request may succeed later; so may any 5xx


@dataclass(frozen=True)
class Item:
    """One line of the manifest. `bytes` and `sha256` are None where nobody has published them.

    With `folder` it is all of a repository of the Hugging Face Hub that is in MODEL_FILES.
    """

    name: str
    url: str
    path: str
    bytes: int | None
    sha256: str | None
    licence: str
    source: str  # the page of whoever publishes the file
    hub: bool = False  # fetched by huggingface_hub
    folder: bool = False
    also: Sequence[str] = ()  # items without which this one is of no use

    @property
    def target(self) -> Path:
        if not self.path.startswith(TORCH_HUB):
            return Path(self.path)
        from torch.hub import get_dir  # a second of import that only this item needs

        return Path(get_dir()) / self.path.removeprefix(TORCH_HUB)

    @property
    def by_hand(self) -> str:
        return f"or get {self.url} by hand (see {self.source}) and place it at {self.target}"


class _Interrupted(Exception):
    """An attempt failed for a reason that may not affect the next one."""


def read_manifest() -> dict[str, Item]:
    """All files that can be fetched, by name."""
    return {name: Item(name, **facts) for name, facts in json.loads(MANIFEST.read_text()).items()}


def name_of(path: Path) -> str:
    """The name of the file that belongs at `path`, or inside it; its last part for any other path."""
    for item in read_manifest().values():
        if path in (Path(item.path), Path(item.path).parent):
            return item.name
    return path.name


def download(name: str, overwrite: bool = False) -> Path:
    """Fetch one file of the manifest, unless it is there already; returns its path."""
    items = read_manifest()
    if name not in items:
        raise UserError(f"There is no download named {name!r}: choose from {', '.join(items)}.")
    for needed in items[name].also:
        fetch(items[needed], overwrite)
    return fetch(items[name], overwrite)


def _keep_or_fetch(name: str, overwrite: bool) -> Path:
    """As the original's functions do: an existing file stays; an unexpected size is only noted."""
    item = read_manifest()[name]
    if overwrite or not item.target.exists():
        return fetch(item, overwrite)
    size = item.target.stat().st_size
    if item.bytes not in (None, size):
        print(
            f"{item.target} has {size} bytes instead of {item.bytes} and is left as it is",
            file=sys.stderr,
        )
    return item.target


def download_pretrained_vae(overwrite: bool = False) -> Path:
    """KL-16, MAR's tokenizer (254 MiB)."""
    return _keep_or_fetch("vae", overwrite)


def download_pretrained_marb(overwrite: bool = False) -> Path:
    """MAR-B (1.6 GiB)."""
    return _keep_or_fetch("mar_base", overwrite)


def download_pretrained_marl(overwrite: bool = False) -> Path:
    """MAR-L (about 3.6 GiB)."""
    return _keep_or_fetch("mar_large", overwrite)


def download_pretrained_marh(overwrite: bool = False) -> Path:
    """MAR-H (about 7.0 GiB)."""
    return _keep_or_fetch("mar_huge", overwrite)


def fetch(
    item: Item,
    overwrite: bool = False,
    *,
    timeout: float = 30.0,
    attempts: int = 6,
    pause: float = 1.0,
) -> Path:
    """Download `item` to its path, continuing the PATH.part of an earlier call.

    timeout: seconds without a byte until an attempt counts as stalled. pause: seconds before the
    second attempt, doubled before each further one. Raises UserError if the file cannot be fetched;
    a partial file stays for the next call, unless it is wrong.
    """
    target = item.target
    if item.folder:
        return _fetch_folder(item, overwrite)
    if target.exists() and not overwrite:
        size = target.stat().st_size
        if item.bytes not in (None, size):
            raise UserError(
                f"{target} has {size} bytes instead of {item.bytes}: delete it or fetch it again "
                f"with `python -m util.download {item.name} --overwrite`."
            )
        return target
    if item.hub:
        return _fetch_from_hub(item, overwrite)
    part = target.with_name(target.name + ".part")
    _announce(item)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(attempts):
            try:
                _continue(item, part, timeout)
                break
            except _Interrupted as reason:
                if attempt == attempts - 1:
                    raise UserError(
                        f"Fetching {item.name} failed {attempts} times (last error: {reason}): "
                        f"run the command again to continue, {item.by_hand}."
                    ) from reason
                print(f"{item.name}: {reason}; trying again", file=sys.stderr)
                time.sleep(pause * 2**attempt)
        _verify(item, part)
        os.replace(part, target)
        _validator(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{item.name} cannot be stored as {target}: {error}.") from error
    return target


def _fetch_from_hub(item: Item, overwrite: bool) -> Path:
    """Let huggingface_hub bring a file of https://huggingface.co/REPOSITORY/resolve/REVISION/NAME."""
    repository, _, rest = item.url.removeprefix(HUB).partition("/resolve/")
    revision, _, filename = rest.partition("/")
    _announce(item)
    with _hub(item.name, item.by_hand) as hub:
        hub.hf_hub_download(
            repository,
            filename,
            revision=revision,
            local_dir=item.target.parent,
            force_download=overwrite,
        )
    _verify(item, item.target)
    return item.target


def _fetch_folder(item: Item, overwrite: bool) -> Path:
    """Let huggingface_hub bring what is missing of the files of https://huggingface.co/REPOSITORY."""
    _announce(item)
    with _hub(item.name, item.by_hand) as hub:
        hub.snapshot_download(
            item.url.removeprefix(HUB),
            allow_patterns=list(MODEL_FILES),
            local_dir=item.target,
            force_download=overwrite,
        )
    hub_weights(item.target)  # without a network the Hub's client takes a folder as it is
    return item.target


def hub_folder(repository: str) -> Path:
    """A model of the Hub in the cache of its client, fetched if it is not there: safetensors alone."""
    with _hub(repository, "or download it by hand and give its folder") as hub:
        return Path(hub.snapshot_download(repository, allow_patterns=list(MODEL_FILES)))


@contextmanager
def _hub(name: str, remedy: str) -> Iterator[ModuleType]:
    """huggingface_hub, for a call that may fail. UserError if it does, or is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name} comes from the Hugging Face Hub: pip install huggingface_hub, {remedy}."
        ) from error
    try:
        yield huggingface_hub
    except Exception as error:  # errors of httpx, requests, the Hub or the disk, by its version
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise UserError(f"{name} could not be fetched ({reason}): try again, {remedy}.") from error


def _announce(item: Item) -> None:
    print(f"{item.name}: {item.url} to {item.target}, licence {item.licence}", file=sys.stderr)


def _validator(part: Path) -> Path:
    """The file that records of which version of the remote file `part` is the start.

    It holds the ETag or the date for If-Range (RFC 9110, section 13.1.5), or nothing where the
    server sends neither; then only length and digest can tell that the remote file has changed.
    """
    return part.with_name(part.stem + ".etag.part")


def _continue(item: Item, part: Path, timeout: float) -> None:
    """One attempt to complete `part`; returns when the server has sent everything."""
    have = part.stat().st_size if part.exists() else 0
    if have and have == item.bytes:
        return
    headers = {"User-Agent": "lazymar-download"}
    if have:
        headers["Range"] = f"bytes={have}-"
        validator = _validator(part).read_bytes() if _validator(part).exists() else b""
        if validator.isascii() and validator.decode("ascii").isprintable() and validator:
            headers["If-Range"] = validator.decode("ascii")
    try:
        # a new opener each time, because urlopen's keeps the proxies of its first call
        with build_opener().open(Request(item.url, headers=headers), timeout=timeout) as response:
            start, total = _extent(item, response, have)
            if not start:
                part.unlink(missing_ok=True)
            validator = response.headers.get("ETag", "W/")
            if validator.startswith("W/"):  # If-Range takes no weak ETag
                validator = response.headers.get("Last-Modified", "")
            _validator(part).write_text(validator)
            _copy(item, response, part, start, total)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return
        if error.code == 416:  # `part` is longer than the file
            part.unlink()
        elif error.code not in TRY_LATER and error.code < 500:
            raise UserError(
                f"The address of {item.name} answers HTTP {error.code} {error.reason}: correct its "
                f"url in {MANIFEST}, {item.by_hand}."
            ) from error
        raise _Interrupted(f"the server answered HTTP {error.code}") from error
    except TimeoutError as error:
        raise _Interrupted(f"nothing arrived for {timeout:g} s") from error
    except (URLError, ConnectionError, HTTPException, ssl.SSLError) as error:
        raise _Interrupted(f"the connection failed ({error!r})") from error


def _extent(item: Item, response: HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where the response starts in the file, and the length of the whole file (None: unknown)."""
    if response.headers.get_content_type() == "text/html":
        raise UserError(
            f"The address of {item.name} gives a web page instead of the file: the link may have "
            f"moved or a proxy may ask for a login; open it in a browser to see, {item.by_hand}."
        )
    start, stated = 0, response.headers.get("Content-Length")
    if response.status == 206:
        span, _, stated = response.headers.get("Content-Range", "").rpartition("/")
        start = have
        if not span.startswith(f"bytes {have}-"):
            raise UserError(
                f"The server was asked for {item.name} from byte {have} and answered {span!r}: use "
                f"another network or proxy, {item.by_hand}."
            )
    total = int(stated) if stated and stated.isdigit() else item.bytes
    if total is None and not response.chunked:
        raise UserError(
            f"The server does not say how long {item.name} is, so a cut could not be noticed: "
            f"use another network or proxy, {item.by_hand}."
        )
    if total is not None and item.bytes is not None and total != item.bytes:
        raise UserError(
            f"The server offers {total} bytes as {item.name}, but {item.bytes} are right: the "
            f"published file has changed; look for a newer version of this project, {item.by_hand}."
        )
    return start, total


def _copy(item: Item, response: HTTPResponse, part: Path, start: int, total: int | None) -> None:
    with (
        open(part, "ab") as file,
        tqdm(
            desc=item.name, total=total, initial=start, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size < total:
        raise _Interrupted(f"the connection ended after {size} of {total} bytes")
    if total is not None and size > total:
        part.unlink()
        raise UserError(
            f"{part} grew to {size} bytes where {total} were expected and was deleted: make sure "
            "that no other process fetches the same file, and run the command again."
        )


def _verify(item: Item, part: Path) -> None:
    """Refuse and delete a wrong file, so that the next call starts again."""
    size = part.stat().st_size
    if item.bytes not in (None, size):
        fault = f"has {size} bytes instead of {item.bytes}"
    elif item.sha256 is None:
        print(f"{item.name}: no digest is published, its content is unverified", file=sys.stderr)
        return
    elif (digest := sha256_of(part)) != item.sha256:
        fault = f"has sha256 {digest} instead of {item.sha256}"
    else:
        return
    part.unlink()
    _validator(part).unlink(missing_ok=True)
    raise UserError(
        f"What arrived as {item.name} {fault} and was deleted: run the command again, "
        f"{item.by_hand}."
    )


def main() -> None:
    """Fetch the named files and print where each of them is."""
    names = list(read_manifest())
    parser = argparse.ArgumentParser(prog="python -m util.download", description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(names))
    parser.add_argument("--overwrite", action="store_true", help="fetch files that exist, too")
    args = parser.parse_args()
    for name in args.names:
        print(download(name, args.overwrite))


if __name__ == "__main__":
    run_main(main)
