"""Downloads against a local server that cuts, lies, stalls and forgets."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine import cli
from tests.support import ROOT
from util import download
from util.errors import UserError, run_main

CONTENT = bytes(range(256)) * 1200  # 300 KiB


class FileServer(ThreadingHTTPServer):
    """Serves CONTENT under every path, with the faults that a test asks for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.headers = {"ETag": '"1"', "Content-Type": "application/octet-stream"}
        self.limits = []  # bytes sent before the connection ends, request by request
        self.statuses = []  # error codes, request by request
        self.ranges = True
        self.says_length = True
        self.content_range = None  # a false Content-Range
        self.stall = None  # an Event: wait for it instead of ending the connection
        self.before_body = lambda: None
        self.requests = []  # (path, Range, If-Range)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        condition = self.headers.get("If-Range")
        server.requests.append((self.path, wanted, condition))
        if server.statuses and (status := server.statuses.pop(0)):
            return self.send_error(status)
        current = condition in (None, server.headers.get("ETag"))
        start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges and current else 0
        size = len(server.content)
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            span = server.content_range or f"bytes {start}-{size - 1}/{size}"
            self.send_header("Content-Range", span)
        if server.says_length:
            self.send_header("Content-Length", str(size - start))
        for name, value in server.headers.items():
            self.send_header(name, value)
        server.before_body()
        self.end_headers()
        limit = server.limits.pop(0) if server.limits else size
        self.wfile.write(server.content[start:][:limit])
        self.wfile.flush()
        if server.stall and limit < size:
            server.stall.wait(20)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = FileServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    if server.stall:
        server.stall.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def make(server, tmp_path):
    """An Item on the server that expects CONTENT, or what the test says."""

    def make(**facts):
        defaults = {
            "name": "weights",
            "url": f"http://127.0.0.1:{server.server_port}/weights.bin",
            "path": str(tmp_path / "folder" / "weights.bin"),
            "bytes": len(CONTENT),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "licence": "MIT",
            "source": "https://example.org",
        }
        return download.Item(**{**defaults, **facts})

    return make


def fetch(item, **options):
    return download.fetch(item, **{"timeout": 5.0, "attempts": 3, "pause": 0.0, **options})


def part_of(item):
    return Path(item.path + ".part")


def ranges(server):
    return [wanted for _, wanted, _ in server.requests]


def test_a_file_arrives_whole_and_leaves_nothing_else_behind(server, make):
    path = fetch(make())
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_cut_transfer_continues_where_it_ended(server, make):
    server.limits = [100_000, 50_000]
    assert fetch(make()).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"]
    assert server.requests[1][2] == '"1"'


def test_a_server_that_ignores_ranges_starts_over(server, make):
    server.limits, server.ranges = [100_000], False
    assert fetch(make()).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize("version", ["ETag", "Last-Modified"])
def test_halves_of_two_versions_are_never_joined(server, make, version):
    item = make(bytes=None, sha256=None)
    server.limits = [100_000]
    server.headers = {"ETag": 'W/"1"', version: '"1"'}
    with pytest.raises(UserError, match=r"ended after 100000 of 307200 bytes"):
        fetch(item, attempts=1)
    server.content, server.headers = CONTENT[::-1], {"ETag": '"2"'}
    assert fetch(item).read_bytes() == CONTENT[::-1]
    assert server.requests[-1][1:] == ("bytes=100000-", '"1"')


def test_a_server_without_versions_can_still_be_continued(server, make):
    server.limits, server.headers = [100_000], {}
    assert fetch(make()).read_bytes() == CONTENT
    assert server.requests[-1][1:] == ("bytes=100000-", None)


def test_another_process_continues_what_a_killed_one_has_left(server, make):
    item = make()
    server.limits, server.stall = [100_000], threading.Event()
    code = f"from util.download import Item, fetch; fetch({item!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        deadline = time.monotonic() + 20
        while not (part_of(item).exists() and part_of(item).stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    left = part_of(item).stat().st_size
    assert 0 < left <= 100_000
    assert fetch(item).read_bytes() == CONTENT
    assert ranges(server) == [None, f"bytes={left}-"]


def test_a_stalled_server_is_given_up_and_what_arrived_is_kept(server, make):
    item = make()
    server.limits, server.stall = [100_000, 10_000], threading.Event()
    with pytest.raises(UserError, match=r"failed 2 times \(last error: nothing arrived for 0.2"):
        fetch(item, attempts=2, timeout=0.2)
    assert part_of(item).read_bytes() == CONTENT[:110_000]
    assert not Path(item.path).exists()


def test_an_address_without_a_server_is_named_with_the_place_for_the_file(make):
    item = make(url="http://127.0.0.1:9/weights.bin")
    with pytest.raises(UserError) as caught:
        fetch(item, attempts=1)
    for fact in (item.url, item.path, item.source, "run the command again"):
        assert fact in str(caught.value)


def test_a_web_page_is_refused_at_once(server, make):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    item = make()
    with pytest.raises(UserError, match="a web page instead of the file"):
        fetch(item)
    assert len(server.requests) == 1
    assert not part_of(item).exists()


def test_another_length_than_the_published_one_is_refused_before_the_transfer(server, make):
    item = make(bytes=12345)
    with pytest.raises(UserError, match=r"offers 307200 bytes as weights, but 12345 are right"):
        fetch(item)
    assert not part_of(item).exists()


def test_a_wrong_digest_is_refused_and_the_next_call_starts_again(server, make):
    item = make()
    server.content = CONTENT[::-1]
    with pytest.raises(UserError, match=r"has sha256 \w{64} instead of \w{64} and was deleted"):
        fetch(item)
    assert list(Path(item.path).parent.iterdir()) == []
    server.content = CONTENT
    assert fetch(item).read_bytes() == CONTENT
    assert ranges(server) == [None, None]


def test_a_wrong_beginning_from_elsewhere_is_refused(server, make):
    item = make()
    part_of(item).parent.mkdir()
    part_of(item).write_bytes(b"x" * len(CONTENT))
    with pytest.raises(UserError, match="has sha256"):
        fetch(item)
    assert server.requests == []


def test_a_file_of_unknown_length_from_a_server_that_tells_none_is_refused(server, make):
    server.says_length = False
    with pytest.raises(UserError, match="does not say how long weights is"):
        fetch(make(bytes=None, sha256=None))
    assert fetch(make()).read_bytes() == CONTENT


def test_a_cut_is_noticed_by_the_published_length_alone(server, make):
    server.says_length, server.limits = False, [100_000]
    assert fetch(make()).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-"]


def test_an_answer_from_another_byte_is_refused(server, make):
    server.limits, server.content_range = [100_000], "bytes 5-307199/307200"
    with pytest.raises(UserError, match=r"from byte 100000 and answered 'bytes 5-307199'"):
        fetch(make())


def test_a_finished_part_of_unknown_length_is_taken_as_it_is(server, make):
    item = make(bytes=None, sha256=None)
    part_of(item).parent.mkdir()
    part_of(item).write_bytes(CONTENT)
    assert fetch(item).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=307200-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, make):
    item = make(bytes=None)
    part_of(item).parent.mkdir()
    part_of(item).write_bytes(CONTENT + b"surplus")
    assert fetch(item).read_bytes() == CONTENT


def test_a_second_writer_of_the_same_part_is_noticed(server, make):
    item = make(bytes=None, sha256=None)
    server.limits = [100_000]

    def second_writer():
        if len(server.requests) == 2:
            with open(part_of(item), "ab") as file:
                file.write(b"from another process")

    server.before_body = second_writer
    with pytest.raises(UserError, match="no other process fetches the same file"):
        fetch(item)
    assert not part_of(item).exists()


def test_a_busy_server_is_asked_again(server, make):
    server.statuses = [503, 429]
    assert fetch(make()).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_missing_file_is_not_asked_for_again(server, make):
    server.statuses = [404]
    with pytest.raises(UserError, match="HTTP 404 Not Found"):
        fetch(make())
    assert len(server.requests) == 1


def test_an_existing_file_is_kept_without_overwrite(server, make):
    item = make(bytes=3)
    Path(item.path).parent.mkdir()
    Path(item.path).write_bytes(b"own")
    assert fetch(item).read_bytes() == b"own"
    assert server.requests == []
    assert fetch(make(), overwrite=True).read_bytes() == CONTENT


def test_a_truncated_file_from_elsewhere_is_not_taken_for_the_real_one(server, make):
    item = make()
    Path(item.path).parent.mkdir()
    Path(item.path).write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match=r"has 1000 bytes instead of 307200: .* --overwrite"):
        fetch(item)


def test_a_place_that_cannot_be_written_is_named(server, make, tmp_path):
    (tmp_path / "folder").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be stored as .*folder/weights\.bin"):
        fetch(make())


def test_the_proxy_of_the_environment_is_used(server, make, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    fetch(make(url="http://weights.example/weights.bin"))
    assert server.requests[0][0] == "http://weights.example/weights.bin"


def test_the_manifest_puts_every_file_where_the_presets_look_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    targets = {name: item.target for name, item in download.read_manifest().items()}
    for name in ("mar_base", "mar_large", "mar_huge"):
        host = cli.named(name).host()
        assert targets[name] == Path(host.resume) / "checkpoint-last.pth"
        assert targets["vae"] == Path(host.tokenizer.vae_path)
        assert targets["fid_stats"] == Path(cli.named(name).request().stats_path)
    for name in ("gpt_b", "gpt_l", "gpt_xl", "gpt_xxl", "gpt_3b"):
        host = cli.named(name).host()
        assert targets[name] == Path(host.resume)
        assert targets["vq16"] == Path(host.images.vae_path)
        assert targets["fid_stats"] == Path(cli.named(name).request().stats_path)
    for name in ("janus_pro_1b", "janus_pro_7b"):
        assert targets[name] == Path(cli.named(name).host().resume)
    assert targets["adm_batch"].parent == targets["fid_stats"].parent
    hub = tmp_path / "hub" / "checkpoints"
    assert targets["inception"] == hub / "weights-inception-2015-12-05-6726825d.pth"


def test_dropbox_links_ask_for_the_file_and_not_for_its_page():
    urls = [item.url for item in download.read_manifest().values()]
    assert all(url.startswith("https://") for url in urls)
    assert all("dl=1" in url.split("&") for url in urls if "dropbox.com" in url)


def test_the_functions_of_the_original_fetch_their_four_files(monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda item, overwrite: (item.name, overwrite))
    assert download.download_pretrained_vae() == ("vae", False)
    assert download.download_pretrained_marb(overwrite=False) == ("mar_base", False)
    assert download.download_pretrained_marl(overwrite=True) == ("mar_large", True)
    assert download.download_pretrained_marh(True) == ("mar_huge", True)


def test_the_command_prints_where_each_file_is(monkeypatch, capsys):
    monkeypatch.setattr(download, "fetch", lambda item, overwrite: item.target)
    monkeypatch.setattr(sys, "argv", ["download", "vae", "fid_stats"])
    download.main()
    paths = ["pretrained_models/vae/kl16.ckpt", "fid_stats/adm_in256_stats.npz"]
    assert capsys.readouterr().out.split() == paths


def test_an_unknown_name_ends_the_command_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download", "mar_small"])
    with pytest.raises(SystemExit) as caught:
        run_main(download.main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: There is no download named 'mar_small': choose from "
        f"{', '.join(download.read_manifest())}.\n"
    )
