"""Processes of a run: rank and world size from the launcher, messages between them, collectives."""

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous as rendezvous_at

from util.config import setting
from util.errors import UserError, sentence_of

PATIENCE = 120.0  # seconds without a heartbeat until a process counts as dead
_BEAT_EVERY = 2.0  # seconds
_POLL_EVERY = 0.1  # seconds
_FAILURE_WITHIN = 5.0  # seconds to wait for the reason after another process has stopped
_QUIET_FOR = 10.0  # seconds of waiting for other processes before a note is printed
_STORE_TIMEOUT = 600.0  # seconds to find the store: other machines may still be starting

Json = object  # what json.dumps takes


@dataclass(frozen=True)
class LaunchConfig:
    """How the processes of a run were started and find each other."""

    world_size: int = setting(1, "set by the launcher; above 1, an error without one", least=1)
    local_rank: int = setting(-1, "ignored; the launcher sets it")
    dist_on_itp: bool = setting(False, "take the ranks from Open MPI's environment")
    dist_url: str = setting("env://", "rendezvous address", metavar="URL")
    patience: float = setting(
        PATIENCE, "seconds without a heartbeat until a process counts as dead", least=1
    )


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


# What launchers set in each process: its rank, their number, its rank on its machine. The first that
# has set both numbers wins, because launchers start each other: torchrun in a step of SLURM.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    # The step decides: a batch script has no STEP_NUM_TASKS, whatever the NTASKS of its job.
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def world_from_env(open_mpi: bool = False, stated_size: int = 1) -> World:
    """The place that a launcher (torchrun, MPI, srun) set in the environment; one process without it.

    An empty variable counts as unset. UserError for values that make no sense, and if a launcher was
    promised by --dist_on_itp or --world_size and there is none.
    """
    launchers = ["Open MPI"] if open_mpi else list(_LAUNCHERS)
    partial = None  # names of a variable that is set and of one that is not
    for launcher in launchers:
        rank_name, size_name, local_name = _LAUNCHERS[launcher]
        rank, size = _number_in_env(rank_name), _number_in_env(size_name)
        if rank is None or size is None:
            is_batch_script = launcher == "SLURM" and rank == 0
            if rank != size and not is_batch_script:
                names = (rank_name, size_name) if size is None else (size_name, rank_name)
                partial = partial or names
            continue
        if rank >= size:
            raise UserError(
                f"{rank_name} is {rank}, but {size_name} is {size}: ranks go from 0 to {size_name} - 1"
            )
        local_rank = _number_in_env(local_name) or 0
        if launcher != "torchrun" and (gpus := torch.cuda.device_count()):
            local_rank %= gpus  # a task may see its own GPU alone
        return World(rank, size, local_rank)
    if partial:
        raise UserError(
            f"{partial[0]} is set, but {partial[1]} is not: start the processes with torchrun "
            f"--nproc_per_node=N, or unset {partial[0]} for a single one"
        )
    if open_mpi or stated_size > 1:
        raise UserError(
            f"{stated_size} processes are stated (--world_size, --dist_on_itp), but "
            f"{_LAUNCHERS[launchers[0]][1]} is not set: start them with torchrun --nproc_per_node=N"
        )
    return World()


def _number_in_env(name: str) -> int | None:
    """A whole number from 0 in the environment, None where it is unset or empty."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name} is {text!r} in the environment; it must be a whole number from 0: unset it, or "
            "start the processes with torchrun --nproc_per_node=N"
        )
    return int(text) if text else None


class Rendezvous:
    """Messages and heartbeats between the processes of a run, without collectives.

    with Rendezvous(world) as rendezvous:
        ...
        rendezvous.publish("sampled", {"images": 12})
        messages = rendezvous.wait("sampled")  # of all processes, by rank

    Messages are in the launcher's key-value store. Waiting for a process that has failed, or that has
    shown no heartbeat for `patience` seconds, is a UserError instead of a hang. A single process
    needs no store.
    """

    def __init__(
        self, world: World | None = None, url: str = "env://", patience: float = PATIENCE
    ) -> None:
        world = world or World()
        self.world, self.patience = world, patience
        self.store = _open_store(world, url) if world.size > 1 else None
        self._attempt = self._round = 0
        self._messages: dict[str, Json] = {}  # of a single process
        self._left = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Rendezvous":
        if self.store is not None:
            self._heartbeat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        if self.store is None:
            return
        self._heartbeat.join()
        with suppress(RuntimeError):
            if error is not None:
                self.store.set(f"failed/{self.world.rank}", reason_of(error))
            self.store.set(f"left/{self.world.rank}", "")
            if self.world.is_main:  # it may host the store, which the others still read
                self._wait_until_left(self.store)

    def _wait_until_left(self, store: dist.Store) -> None:
        keys = [f"left/{rank}" for rank in range(self.world.size)]
        for _ in range(round(_FAILURE_WITHIN / _POLL_EVERY)):
            if store.check(keys):
                return
            time.sleep(_POLL_EVERY)

    def next_round(self) -> None:
        """Begin another evaluation with its own messages; every process calls it."""
        self._round += 1

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """If the block fails, all processes get the error for this attempt; the run continues."""
        self._attempt, self._round = self._attempt + 1, 0
        try:
            yield
        except Exception as error:
            if self.store is not None:
                with suppress(RuntimeError):
                    self.store.set(self._failure_key(self.world.rank), reason_of(error))
            raise

    def publish(self, topic: str, message: Json = None) -> None:
        """Publish a JSON document, once per topic and round."""
        if self.store is None:
            self._messages[self._key(topic, 0)] = message
            return
        try:
            self.store.set(self._key(topic, self.world.rank), json.dumps(message))
        except RuntimeError as error:
            raise self._lost() from error

    def wait(self, topic: str, ranks: Sequence[int] | None = None) -> list[Any]:
        """Messages of these processes, or of all. UserError if one will never come."""
        if self.store is None:
            return [self._messages[self._key(topic, 0)]]
        ranks = range(self.world.size) if ranks is None else ranks
        try:
            return [self._wait_for(self.store, topic, rank) for rank in ranks]
        except RuntimeError as error:
            raise self._lost() from error

    def raise_peer_failure(self, error: RuntimeError) -> NoReturn:
        """After a failed collective: raise why another process stopped, or `error` if none did."""
        for _ in range(round(_FAILURE_WITHIN / _POLL_EVERY) if self.store is not None else 0):
            for rank in range(self.world.size):
                with suppress(RuntimeError):  # the launcher may be gone, too
                    self._raise_failure_of(self.store, rank)
            time.sleep(_POLL_EVERY)
        raise error

    def _raise_failure_of(self, store: "dist.Store | None", rank: int) -> None:
        if store is None:
            return
        for key, happened in ((f"failed/{rank}", "stopped"), (self._failure_key(rank), "failed")):
            if failure := _read(store, key):
                raise UserError(
                    f"process {rank} of {self.world.size} has {happened}: {failure}"
                ) from None

    def _wait_for(self, store: dist.Store, topic: str, rank: int) -> Json:
        last, since = None, time.monotonic()
        while (message := _read(store, self._key(topic, rank))) is None:
            self._raise_failure_of(store, rank)
            beat = _read(store, f"heartbeat/{rank}")
            if beat != last:
                last, since = beat, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise UserError(
                    f"process {rank} of {self.world.size} has shown no sign of life for "
                    f"{self.patience:g} s: finished images are kept; start the same command again"
                )
            time.sleep(_POLL_EVERY)
        return json.loads(message)

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._attempt}/{self._round}/{topic}/{rank}"

    def _failure_key(self, rank: int) -> str:
        return f"{self._attempt}/failed/{rank}"

    def _lost(self) -> UserError:
        return UserError(
            f"process {self.world.rank} has lost the launcher's store, so another process or machine "
            "has stopped: finished images are kept; start the same command again"
        )

    def _beat(self) -> None:
        assert self.store is not None
        for count in itertools.count():
            try:
                self.store.set(f"heartbeat/{self.world.rank}", str(count))
            except RuntimeError:
                return  # the waiting process will notice and say so
            if self._left.wait(_BEAT_EVERY):
                return


def reason_of(error: BaseException) -> str:
    """An error in one sentence, for the other processes."""
    return sentence_of(error) or str(error) or type(error).__name__


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _open_store(world: World, url: str) -> dist.Store:
    url = _slurm_url() if url == "env://" and not os.environ.get("MASTER_ADDR") else url
    place = urlsplit(url)
    if place.scheme == "file" and not (folder := Path(place.path).parent).is_dir():
        raise UserError(f"--dist_url is {url}, but there is no folder {folder}: create it")
    text = f"note: process {world.rank} of {world.size} waits for the others at {url}"
    waiting = threading.Timer(_QUIET_FOR, lambda: print(text, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        timeout = timedelta(seconds=_STORE_TIMEOUT)
        store, _, _ = next(rendezvous_at(url, world.rank, world.size, timeout=timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {world.rank} of {world.size} cannot reach the others at {url} ({reason}): start "
            "them with torchrun"
        ) from error
    finally:
        waiting.cancel()
    return dist.PrefixStore("rendezvous", store)


def _slurm_url() -> str:
    """Where the tasks of a SLURM step meet: on its first node, at a port that its numbers give.

    "env://", which asks for MASTER_ADDR, where there is no step.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")  # such as gpu[03-07,12],other
    first = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        return "env://"
    numbers = [_number_in_env(f"SLURM_{name}") or 0 for name in ("JOB_ID", "STEP_ID")]
    port = os.environ.get("MASTER_PORT") or 20000 + sum(numbers) % 10000
    return f"tcp://{''.join(part or '' for part in first.groups())}:{port}"


def start(rendezvous: Rendezvous, device: torch.device) -> None:
    """Join the process group: nccl on CUDA, gloo elsewhere. One process joins nothing."""
    world = rendezvous.world
    if world.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        assert rendezvous.store is not None  # there are several processes
        store = dist.PrefixStore("group", rendezvous.store)
        dist.init_process_group(backend, store=store, world_size=world.size, rank=world.rank)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait for all processes."""
    if world.size > 1:
        dist.barrier()


def mean(value: Tensor, world: World) -> Tensor:
    """The mean of a tensor over all processes, in every process."""
    if world.size == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world.size


def any_rank(flag: bool, world: World, device: torch.device) -> bool:
    """True in every process if `flag` is true in at least one."""
    if world.size == 1:
        return flag
    vote = torch.tensor(float(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())
