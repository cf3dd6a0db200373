"""Every command finishes whatever its standard streams are: closed, full, piped away, ASCII."""

import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.walk_streams import STATES

FOLDERS = ("util", "engine", "models", "diffusion", "benchmarks")
FILES = sorted(
    [*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))]
)
COMMANDS = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in FILES
    if '__name__ == "__main__"' in file.read_text()
}
TRAINING = ["--model", "mar_tiny", "--use_cached", "--num_workers", "0", "--device", "cpu"]
TRAINING += ["--batch_size", "2", "--max_steps", "3", "--log_freq", "1"]
TRAINING += ["--num_sampling_steps", "2", "--diffloss_d", "1", "--diffloss_w", "16"]
SAMPLING = ["--model", "mar_tiny", "--num_images", "4", "--eval_bsz", "2", "--num_iter", "1"]
SAMPLING += ["--num_sampling_steps", "2", "--device", "cpu"]


def test_every_command_runs_in_run_main():
    assert {"eval", "main_mar", "main_cache", "demo", "util.download"} <= set(COMMANDS)
    for module, file in COMMANDS.items():
        last = ast.parse(file.read_text()).body[-1]
        assert isinstance(last, ast.If), module
        assert [ast.unparse(line) for line in last.body] == ["run_main(main)"], module


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Every command's --help, an evaluation and a training, in every state of the streams."""
    folder = tmp_path_factory.mktemp("walk")
    for name in ("a", "b"):
        (folder / "latents" / name).mkdir(parents=True)
        for i in range(4):
            moments = np.random.default_rng(i).normal(size=(16, 16, 16)).astype(np.float32)
            np.savez(folder / "latents" / name / f"{i}.npz", moments=moments, moments_flip=moments)
    runs = [[module, ["--help"]] for module in sorted(COMMANDS)]
    runs.append(["eval", [*SAMPLING, "--output_dir", f"{folder}/eval-STATE"]])
    data = ["--cached_path", f"{folder}/latents", "--output_dir", f"{folder}/train-STATE"]
    runs.append(["main_mar", [*TRAINING, *data]])
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.walk_streams", str(folder)],
        input="\n".join(map(json.dumps, runs)), cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(runs) * len(STATES)
    return folder, lines


def test_every_command_ends_well_in_every_state(walked):
    assert [line for line in walked[1] if line[2] != 0] == []


def test_nothing_prints_a_traceback_and_a_lost_stdout_is_told(walked):
    for module, state, _, _, err in walked[1]:
        assert "Traceback" not in err and "Exception ignored" not in err, (module, state)
        if state in ("stdout full", "stdout piped away"):
            assert err.count("note: stdout is lost") == 1, (module, state)


@pytest.mark.parametrize("state", STATES)
def test_an_evaluation_keeps_its_results_and_its_last_line(walked, state):
    folder, lines = walked
    (results,) = (folder / f"eval-{state.replace(' ', '_')}").glob("*/results.json")
    found = json.loads(results.read_text())
    assert found["fid"] is not None
    (out,) = [line[3] for line in lines[-2 * len(STATES) : -len(STATES)] if line[1] == state]
    if "stdout" not in state and "both" not in state:
        assert json.loads(out.splitlines()[-1])["fid"] == found["fid"]
        assert ("\\xb1" in out) == (state == "ASCII")


@pytest.mark.parametrize("state", STATES)
def test_a_training_keeps_its_log_and_its_checkpoint(walked, state):
    folder = walked[0] / f"train-{state.replace(' ', '_')}"
    log = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3]
    assert (folder / "checkpoint-last.pth").stat().st_size > 1000
