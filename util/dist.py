"""Processes of a run: rank and world size from the launcher, messages between them, collectives."""

import itertools
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous as rendezvous_at

from util.config import setting
from util.errors import UserError

PATIENCE = 120.0  # seconds without a sign of life until a process counts as dead
_BEAT_EVERY = 2.0  # seconds
_POLL_EVERY = 0.1  # seconds
_FAILURE_WITHIN = 5.0  # seconds in which a process that stops says why
_STORE_TIMEOUT = 600.0  # seconds to find the store, in which the other machines may start up

Json = object  # what json.dumps takes


@dataclass(frozen=True)
class LaunchConfig:
    """How the processes of a run were started and find each other."""

    world_size: int = setting(1, "accepted; the launcher says how many there are", least=1)
    local_rank: int = setting(-1, "accepted; the launcher says it")
    dist_on_itp: bool = setting(False, "take the ranks from Open MPI's environment")
    dist_url: str = setting("env://", "where the processes meet", metavar="URL")
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
        self._round = 0
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
        if error is not None:
            with suppress(RuntimeError):
                self.store.set(f"failed/{self.world.rank}", str(error) or type(error).__name__)

    def next_round(self) -> None:
        """Begin another evaluation with its own messages; every process calls it."""
        self._round += 1

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
        if store is not None and (failure := _read(store, f"failed/{rank}")):
            raise UserError(f"process {rank} of {self.world.size} has stopped: {failure}") from None

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
        return f"{self._round}/{topic}/{rank}"

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


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _open_store(world: World, url: str) -> dist.Store:
    try:
        timeout = timedelta(seconds=_STORE_TIMEOUT)
        store, _, _ = next(rendezvous_at(url, world.rank, world.size, timeout=timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {world.rank} of {world.size} cannot reach the others at {url} ({reason}): start "
            "them with torchrun"
        ) from error
    return dist.PrefixStore("rendezvous", store)


def start(rendezvous: Rendezvous, device: torch.device) -> None:
    """Join the process group: nccl on CUDA, gloo elsewhere. One process joins nothing."""
    world = rendezvous.world
    if world.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
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
