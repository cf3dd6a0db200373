"""A commit is recorded only if the code belongs to it, and bundled files are found beside the code."""

import os
import shutil
import subprocess

import pytest

from engine import cli
from tests.support import ROOT
from util.evaluation import feature_weights, run_folder
from util.files import beside_code


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the file that asks for its commit, in a folder of a repository that does not track it."""
    git(tmp_path, "init", "-q")
    (tmp_path / "readme").write_text("another project")
    git(tmp_path, "add", "readme")
    git(tmp_path, "commit", "-qm", "first")
    folder = tmp_path / "unpacked"
    folder.mkdir()
    shutil.copy(run_folder.__file__, folder / "run_folder.py")
    monkeypatch.setattr(run_folder, "__file__", str(folder / "run_folder.py"))
    return folder


def test_the_commit_of_a_repository_around_unpacked_code_is_not_ours(code):
    found = run_folder.provenance()
    assert found["commit"] is None
    assert found["commit_unknown"] == "the git repository around the code does not track it"


def test_code_that_is_committed_has_a_commit_with_a_plus_if_files_changed(code):
    git(code.parent, "add", ".")
    git(code.parent, "commit", "-qm", "second")
    found = run_folder.provenance()
    assert len(str(found["commit"])) >= 7 and "commit_unknown" not in found
    (code / "run_folder.py").write_text("changed")
    assert run_folder.provenance()["commit"] == f"{found['commit']}+"


def test_the_repository_of_a_hook_is_not_asked(code, tmp_path, monkeypatch):
    git(code.parent, "add", ".")
    git(code.parent, "commit", "-qm", "second")
    commit = run_folder.provenance()["commit"]
    other = tmp_path.parent / f"{tmp_path.name}-other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert run_folder.provenance()["commit"] == commit


def test_no_repository_and_no_git_are_reasons(tmp_path, monkeypatch):
    shutil.copy(run_folder.__file__, tmp_path / "run_folder.py")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in str(run_folder.provenance()["commit_unknown"])
    monkeypatch.setenv("PATH", "")
    assert "git cannot be run" in str(run_folder.provenance()["commit_unknown"])


# ---- bundled files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mar_tiny", "gpt_tiny", "janus_tiny"])
@pytest.mark.parametrize("rival", [False, True], ids=["elsewhere", "beside an empty folder"])
def test_files_of_a_bundled_model_are_found_from_any_folder(tmp_path, monkeypatch, model, rival):
    monkeypatch.chdir(tmp_path)
    if rival:
        (tmp_path / "pretrained_models" / model).mkdir(parents=True)
    selection = cli.named(model)
    paths = [selection.request().features_path, selection.request().stats_path]
    paths += [v for k, v in selection.defaults.items() if k in ("resume", "vae_path")]
    assert len(paths) >= 3
    for path in paths:
        assert os.path.exists(path), path


def test_a_file_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "pretrained_models/mar_tiny/fid_stats.npz"
    assert beside_code(name) == str(ROOT / name)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert beside_code(name) == name
    assert beside_code("no/such/file") == "no/such/file"


def test_the_bundled_classifier_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (feature_weights.SHAPES, feature_weights.PROMPTS):
        assert os.path.isfile(feature_weights.bundled_weights(name, None))
