"""eval.py by torchrun: two processes, two machines, a machine that dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import LIMIT, agent, finish, free_port, result_of, workers_of
from tests.support.runs import flags_for, images_of, scores

IMAGES, BATCH = 23, 2  # twelve batches, the last of them padded
FLAGS = ["--num_images", IMAGES, "--eval_bsz", BATCH, "--num_iter", 8]


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> dict:
    """The result of one process."""
    argv = flags_for(weights / "official", tmp_path_factory.mktemp("alone"), *FLAGS)
    process = subprocess.run(
        [sys.executable, "eval.py", *argv], cwd=ROOT, capture_output=True, text=True
    )
    return result_of((process.returncode, process.stdout, process.stderr))


def test_two_processes_make_and_score_the_images_of_one(alone, weights, tmp_path):
    argv = flags_for(weights / "official", tmp_path, *FLAGS)
    result = result_of(finish(agent(1, 2, free_port(), argv)))
    assert images_of(result) == images_of(alone)
    assert scores(result) == pytest.approx(scores(alone), rel=1e-6)
    assert (result["processes"], result["generated"]) == (2, IMAGES)
    left = {path.name for path in Path(result["images_dir"]).parent.iterdir()}
    assert left == {"images", "manifest.json", "results.json", "sheet.png"}


@pytest.mark.skipif(shutil.which("ps") is None, reason="looks for the processes by ps")
def test_after_a_machine_dies_nobody_hangs_and_two_machines_finish(alone, weights, tmp_path):
    argv = flags_for(weights / "official", tmp_path, *FLAGS, "--patience", 5)
    port = free_port()
    machines = [agent(2, 1, port, argv, hosts) for hosts in (True, False)]
    deadline = time.monotonic() + LIMIT
    while not any(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    (worker,) = workers_of(machines[1])
    os.kill(worker, signal.SIGKILL)
    survivor, victim = (finish(machine) for machine in machines)
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("images/*.png")}
    assert 0 < len(made) < IMAGES
    assert survivor[0] != 0 and victim[0] != 0
    assert "error: process" in survivor[2] and "start the same command again" in survivor[2]

    port = free_port()
    again = [agent(2, 1, port, argv, hosts) for hosts in (True, False)]
    result = result_of(*(finish(machine) for machine in again))
    assert images_of(result) == images_of(alone)
    assert scores(result) == pytest.approx(scores(alone), rel=1e-6)
    for name, content in made.items():
        assert (Path(alone["images_dir"]) / name).read_bytes() == content


def test_slurm_starts_one_torchrun_per_machine_which_all_meet_at_the_first(tmp_path):
    stubs = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'shift; exec "$@"',
        "torchrun": "printf '%s\\n' \"$@\"",
    }
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    script = str(ROOT / "scripts" / "eval_slurm.sh")
    command = ["bash", script, "--num_images", "10", "--resume", "a b"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    rendezvous = ["--rdzv-id=123456", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:23456"]
    assert words[:5] == ["--nnodes=2", "--nproc_per_node=4", *rendezvous]
    assert words[5:] == ["eval.py", "--num_images", "10", "--resume", "a b"]
