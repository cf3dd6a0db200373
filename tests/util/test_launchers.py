"""Rank and world size from the environments that launchers make."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT
from util import dist
from util.dist import World, world_from_env
from util.errors import UserError

PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "OMPI_", "PMI_", "MV2_", "FLUX_", "MPI_")
PREFIXES += ("SLURM_",)


def slurm(rank: int, size: int, **more: str) -> dict[str, str]:
    step = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}
    return {**step, "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "8", **more}


def open_mpi(rank: int, size: int) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK")
    return {f"OMPI_COMM_WORLD_{n}": str(v) for n, v in zip(names, (rank, size, rank), strict=True)}


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; those of launchers that the tests may run under are gone."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 4, 1)),
        ({**slurm(0, 2), **open_mpi(1, 2), **TORCHRUN}, World(3, 4, 1)),
        (slurm(1, 2), World(1, 2, 1)),
        (slurm(0, 1), World()),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, World()),  # sbatch
        ({"SLURM_NTASKS": "8"}, World()),  # salloc
        ({**slurm(0, 2), **open_mpi(3, 4)}, World(3, 4, 3)),  # mpirun starts its daemons by srun
        (open_mpi(1, 2), World(1, 2, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, World(1, 2, 1)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, World(1, 2, 0)),
        ({"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"}, World(3, 4, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, World()),
        ({"RANK": " ", "WORLD_SIZE": "", "LOCAL_RANK": ""}, World()),
        ({**slurm(1, 2), "RANK": "", "WORLD_SIZE": ""}, World(1, 2, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, World(1, 2, 0)),
    ],
)
def test_the_launcher_nearest_to_the_process_gives_its_rank(environment, variables, world):
    environment(variables)
    assert world_from_env() == world


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0, but WORLD_SIZE is 0"),
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "WORLD_SIZE is set, but RANK is not"),
        (slurm(5, 2), "SLURM_PROCID is 5, but SLURM_STEP_NUM_TASKS is 2"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_STEP_NUM_TASKS is not"),
        ({"SLURM_PROCID": "a", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is 'a'"),
        (open_mpi(2, 2), "OMPI_COMM_WORLD_RANK is 2"),
    ],
)
def test_values_that_make_no_sense_are_one_sentence(environment, variables, words):
    environment(variables)
    with pytest.raises(UserError, match=words):
        world_from_env()


def test_a_promised_launcher_that_is_not_there_is_refused(environment):
    environment({"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": ""})
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE is not set"):
        world_from_env(open_mpi=True)
    with pytest.raises(UserError, match="8 processes are stated"):
        world_from_env(stated_size=8)


def test_a_task_that_sees_only_its_own_gpu_uses_it(environment, monkeypatch):
    environment(slurm(5, 8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert world_from_env() == World(5, 8, 0)
    environment(TORCHRUN)  # torchrun's local rank is a GPU that must be there
    assert world_from_env() == World(3, 4, 1)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[03-07,12],other", "gpu03"),
        ("rack1-n[5,9]-ib,z", "rack1-n5-ib"),
        ("a.b.c,d", "a.b.c"),
    ],
)
def test_the_tasks_of_a_step_meet_on_its_first_node(environment, nodes, host):
    environment({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"})
    assert dist._slurm_url() == f"tcp://{host}:23458"
    environment({"MASTER_PORT": "4711"})
    assert dist._slurm_url() == f"tcp://{host}:4711"


MEET = """
import torch
from util import dist
from util.errors import run_main

def main():
    world = dist.world_from_env()
    with dist.Rendezvous(world) as rendezvous:
        rendezvous.publish("here", world.rank)
        print(rendezvous.wait("here"))

run_main(main)
"""


def started(code: str, variables: dict[str, str]) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def test_two_tasks_of_a_step_meet_without_a_master_address():
    here = {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [started(MEET, slurm(rank, 2, **here)) for rank in range(2)]
    outputs = [task.communicate(timeout=60) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["[0, 1]\n"] * 2


@pytest.mark.parametrize(
    "variables",
    [
        slurm(1, 2),  # no node list, no MASTER_ADDR
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_processes_that_cannot_meet_say_so_at_once(variables):
    task = started(MEET, variables)
    out, err = task.communicate(timeout=60)
    assert (task.returncode, out) == (2, "")
    assert err.startswith("error: process ")
    assert err.count("\n") == 1


def test_waiting_for_the_others_is_not_silent():
    code = MEET.replace("def main():", "dist._QUIET_FOR = 0.1\ndef main():")
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    task = started(code, alone)
    try:
        assert task.stderr.readline().startswith("note: process 0 of 2 waits for the others at")
    finally:
        task.kill()
        task.communicate()
