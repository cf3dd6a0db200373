"""Files of the Hugging Face Hub, fetched by its own client; what the original's functions leave alone."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from util import download
from util.errors import UserError

NAMES = ("detok_mar_base", "detok_mar_large", "detok_tokenizer", "detok_stats")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub that records its calls, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("huggingface_hub")
    module.calls, module.fails = [], None

    def hf_hub_download(repo_id, filename, *, revision, local_dir, force_download):
        module.calls.append((repo_id, filename, revision, force_download))
        if module.fails:
            raise module.fails
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / filename).write_bytes(b"weights")

    def snapshot_download(repo_id, *, allow_patterns, local_dir=None, force_download=False):
        module.calls.append((repo_id, tuple(allow_patterns), local_dir, force_download))
        if module.fails:
            raise module.fails
        folder = Path(local_dir or "cache")
        folder.mkdir(parents=True, exist_ok=True)
        for name in module.found:
            (folder / name).write_bytes(b"weights")
        return str(folder)

    module.hf_hub_download, module.snapshot_download = hf_hub_download, snapshot_download
    module.found = ["config.json", "model.safetensors"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_hub_lands_at_its_path(hub, name):
    path = download.download(name)
    assert path == download.read_manifest()[name].target
    assert path.read_bytes() == b"weights"
    assert hub.calls[-1] == ("jjiaweiyang/l-DeTok", path.name, "main", False)


def test_the_tokenizer_fetches_the_statistics_that_it_needs(hub):
    download.download("detok_tokenizer", overwrite=True)
    files = ["stats.pkl", "detok-BB-gamm3.0-m0.7-decoder_tuned.pth"]
    assert [call[1] for call in hub.calls] == files
    assert all(call[3] for call in hub.calls)


def test_a_file_that_is_there_is_not_fetched_again(hub):
    download.download("detok_mar_base")
    download.download("detok_mar_base")
    assert len(hub.calls) == 1


def test_a_folder_of_the_hub_comes_without_pickles_and_what_is_there_stays(hub):
    path = download.download("janus_pro_1b")
    assert path == Path("pretrained_models/janus/Janus-Pro-1B")
    assert (path / "model.safetensors").read_bytes() == b"weights"
    patterns = ("*.safetensors", "*.json", "*.jinja")
    assert hub.calls == [("deepseek-community/Janus-Pro-1B", patterns, path, False)]
    download.download("janus_pro_1b")  # a cut transfer leaves a folder, so its client looks again
    assert len(hub.calls) == 2
    assert download.hub_folder("someone/Janus") == Path("cache")
    assert hub.calls[-1] == ("someone/Janus", patterns, None, False)


def test_a_folder_that_came_without_its_weights_is_refused(hub):
    hub.found = ["config.json"]
    with pytest.raises(UserError, match=r"Janus-Pro-7B holds neither model\.safetensors nor"):
        download.download("janus_pro_7b")
    hub.fails = RuntimeError("offline")
    with pytest.raises(UserError, match=r"janus_pro_7b could not be fetched \(offline\)"):
        download.download("janus_pro_7b")


def test_a_failure_of_the_hub_is_one_sentence_with_another_way(hub):
    hub.fails = RuntimeError("404 Client Error\nEntry Not Found")
    with pytest.raises(UserError, match=r"fetched \(404 Client Error\).*https") as caught:
        download.download("detok_stats")
    assert "\n" not in str(caught.value)


def test_without_the_client_its_package_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub, or get https"):
        download.download("detok_mar_base")


@pytest.mark.parametrize(
    ("call", "name"), [("vae", "vae"), ("marb", "mar_base"), ("marh", "mar_huge")]
)
def test_the_originals_functions_leave_an_existing_file_and_note_its_size(
    monkeypatch, tmp_path, capsys, call, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    item = download.read_manifest()[name]
    item.target.parent.mkdir(parents=True)
    item.target.write_bytes(b"mine")
    assert getattr(download, f"download_pretrained_{call}")(overwrite=False) == item.target
    assert item.target.read_bytes() == b"mine"
    note = f"{item.target} has 4 bytes instead of {item.bytes} and is left as it is\n"
    assert capsys.readouterr().err == (note if item.bytes else "")
