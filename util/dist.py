"""Processes of a run: the launcher's environment in, rank and world size out."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from util.errors import UserError


@dataclass(frozen=True)
class World:
    """Place of this process among the processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0


def world_from_env(open_mpi: bool = False, stated_size: int = 1) -> World:
    """The place that torchrun (or Open MPI) sets in the environment; one process without it.

    UserError if a launcher was promised by --dist_on_itp or --world_size and there is none.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if open_mpi:
        names = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK"))
    values = [os.environ.get(name) for name in names]
    if None in values[:2]:
        if open_mpi or stated_size > 1:
            raise UserError(
                f"{stated_size} processes are stated (--world_size, --dist_on_itp), but "
                f"{names[1]} is not set: start them with torchrun --nproc_per_node=N"
            )
        return World()
    return World(*(int(value or 0) for value in values))


def start(world: World, device: torch.device, url: str = "env://") -> None:
    """Join the process group: nccl on CUDA, gloo elsewhere. One process joins nothing."""
    if world.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=url, world_size=world.size, rank=world.rank)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """True in every process if `flag` is true in at least one."""
    if world.size == 1:
        return flag
    vote = torch.tensor(float(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())
