"""benchmarks/*.sh: every stage is a command that its benchmark accepts, and a result is made once."""

import importlib
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

PYTHON = """#!/bin/bash
echo "$@" >> "{log}"
case "$2" in {fails}) exit 1 ;; esac
while [ $# -gt 1 ] && [ "$1" != --output ]; do shift; done
[ "$1" != --output ] || {{ mkdir -p "$(dirname "$2")" && echo {{}} > "$2.json"; }}
echo "a red disc"
"""
BENCHMARKS = {"latency", "waterfall", "line_latency", "training"}


@pytest.fixture
def script(tmp_path):
    """Runs a script with a stand-in for Python, which writes results; returns what it was called with."""

    def call(name, *stages, device="cpu", fails="none", code=0):
        python, log = tmp_path / "python", tmp_path / "log"
        python.write_text(PYTHON.format(log=log, fails=fails))
        python.chmod(0o755)
        log.write_text("")
        settings = {"DEVICE": device, "PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
        command, env = ["bash", ROOT / "benchmarks" / name, *stages], {**os.environ, **settings}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        return [line.split() for line in log.read_text().splitlines()], result

    return call


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_stage_is_a_command_that_its_benchmark_accepts(script, monkeypatch, device):
    calls, _ = script("gpu.sh", device=device)
    assert {words[1].removeprefix("benchmarks.") for words in calls} == BENCHMARKS
    for words in calls:
        module = importlib.import_module(words[1])
        at = words.index("--device")
        assert words[at + 1] == device
        argv = [w if i != at + 1 else "cpu" for i, w in enumerate(words)]
        monkeypatch.setattr(sys, "argv", argv[1:])
        assert module.parse()


def test_a_stage_with_a_result_is_skipped_and_a_failed_one_repeated(script):
    first, result = script("gpu.sh", fails="benchmarks.waterfall", code=1)
    assert result.stdout.count("failed") == 2
    again, _ = script("gpu.sh")
    assert len(again) == 2
    assert len(first) == result.stdout.count(" s  ")
    nothing, result = script("gpu.sh")
    assert nothing == []
    assert result.stdout.count("there already") == len(first)


def test_one_stage_can_be_asked_for_and_an_unknown_one_is_refused(script):
    calls, _ = script("gpu.sh", "training")
    assert [words[1] for words in calls] == ["benchmarks.training"]
    calls, result = script("gpu.sh", "speed", code=2)
    assert calls == []
    assert "speed is no stage" in result.stderr


def test_the_tables_of_text_to_image_are_made_once(script, monkeypatch):
    calls = [words for words in script("line_text.sh")[0] if words[1].startswith("benchmarks.")]
    modules = [words[1].removeprefix("benchmarks.") for words in calls]
    assert modules == ["line_locality", "line_locality", "line_prompts"]
    pytest.importorskip("transformers", reason="transformers is not installed")
    for words in calls:
        monkeypatch.setattr(sys, "argv", words[1:])
        assert importlib.import_module(words[1]).parse()
    again, _ = script("line_text.sh")
    assert [words[1] for words in again] == ["benchmarks.line_prompts"]  # it resumes by itself
    monkeypatch.setenv("JANUS", str(ROOT / "pretrained_models" / "other"))
    other, _ = script("line_text.sh")
    assert [words[1] for words in other] == ["benchmarks.line_locality", "benchmarks.line_prompts"]
