"""torchrun in the background: one machine, or several on this one."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.support import ROOT

LIMIT = 150  # seconds, for machines much slower than those this was written on


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def agent(
    nodes: int, processes: int, port: int, argv: list[str], hosts: bool = True
) -> subprocess.Popen:
    """One machine's torchrun; one of them `hosts` the place where they meet."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    command += [f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}"]
    command += [f"--rdzv-conf=is_host={int(hosts)}", "eval.py", *argv]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; killed if it hangs, which fails the test."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"{process.args} hangs")
    return process.returncode, out, err


def result_of(*outputs: tuple[int, str, str]) -> dict:
    """The JSON document that one of some processes has printed."""
    assert [code for code, _, _ in outputs] == [0] * len(outputs), outputs
    (last,) = [out.splitlines()[-1] for _, out, _ in outputs if out.strip()]
    return json.loads(last)


def train_in_two_processes(*flags: object) -> None:
    """main_mar.py with the small model of train_small.py, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}", "tests/support/train_small.py", *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids of an agent's children."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = (line.split() for line in listing.stdout.splitlines())
    return [int(pid) for pid, parent in pairs if int(parent) == process.pid]
