"""benchmarks/line_text.sh: every command is one that its benchmark accepts, and results are made once."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

PYTHON = """#!/bin/bash
echo "$@" >> "{log}"
while [ $# -gt 1 ] && [ "$1" != --output ]; do shift; done
[ "$1" != --output ] || echo {{}} > "$2.json"
echo "a red disc"
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script with a stand-in for Python; returns what it was called with."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def call():
        log.write_text("")
        settings = {"PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
        command = ["bash", ROOT / "benchmarks" / "line_text.sh"]
        subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
        return [line.split() for line in log.read_text().splitlines()]

    return call


def test_every_command_is_accepted_and_a_result_is_made_once(script, monkeypatch):
    calls = [words for words in script() if words[1].startswith("benchmarks.")]
    modules = [words[1].removeprefix("benchmarks.") for words in calls]
    assert modules == ["line_locality", "line_locality", "line_prompts"]
    pytest.importorskip("transformers", reason="transformers is not installed")
    for words in calls:
        monkeypatch.setattr(sys, "argv", words[1:])
        assert importlib.import_module(words[1]).parse()
    assert [words[1] for words in script()] == ["benchmarks.line_prompts"]  # it resumes by itself
