"""Processes of a run: the launcher's environment in, rank and world size out; how they meet."""

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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from util.config import setting
from util.errors import UserError

PATIENCE = 120.0  # seconds without a sign of life until a process counts as dead
_BEAT_EVERY = 2.0  # seconds
_LOOK_EVERY = 0.1  # seconds
_BLAME_WITHIN = 5.0  # seconds in which a process that stops says why
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


class Meeting:
    """How the processes of a run tell each other where they are, without collectives.

    with Meeting(world) as meeting:
        ...
        meeting.say("sampled", {"images": 12})
        words = meeting.wait("sampled")  # of all processes, by rank

    The words lie in the launcher's key-value store, beside a beat of every process. Who waits for one
    that has failed, or shows no beat for `patience` seconds, gets a UserError and does not hang. One
    process needs no store.
    """

    def __init__(
        self, world: World | None = None, url: str = "env://", patience: float = PATIENCE
    ) -> None:
        world = world or World()
        self.world, self.patience = world, patience
        self.store = _open_store(world, url) if world.size > 1 else None
        self._round = 0
        self._words: dict[str, Json] = {}  # of a single process
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Meeting":
        if self.store is not None:
            self._beating.start()
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
        self._beating.join()
        if error is not None:
            with suppress(RuntimeError):
                self.store.set(f"failed/{self.world.rank}", str(error) or kind.__name__)

    def next_round(self) -> None:
        """Begin another evaluation, whose words are not those of the last; all processes do."""
        self._round += 1

    def say(self, topic: str, word: Json = None) -> None:
        """State something that can be JSON, once per topic and round."""
        if self.store is None:
            self._words[self._key(topic, 0)] = word
            return
        try:
            self.store.set(self._key(topic, self.world.rank), json.dumps(word))
        except RuntimeError as error:
            raise self._lost() from error

    def wait(self, topic: str, ranks: Sequence[int] | None = None) -> list[Json]:
        """The words of these processes, or of all, on a topic. UserError if one will never come."""
        if self.store is None:
            return [self._words[self._key(topic, 0)]]
        ranks = range(self.world.size) if ranks is None else ranks
        try:
            return [self._wait_for(topic, rank) for rank in ranks]
        except RuntimeError as error:
            raise self._lost() from error

    def blame(self, error: RuntimeError) -> Exception:
        """What to raise for a failed collective: the process that has stopped and why, if one has."""
        for _ in range(round(_BLAME_WITHIN / _LOOK_EVERY) if self.store is not None else 0):
            for rank in range(self.world.size):
                with suppress(RuntimeError):  # the launcher may have gone, too
                    if failure := self._read(f"failed/{rank}"):
                        return UserError(
                            f"process {rank} of {self.world.size} has stopped: {failure}"
                        )
            time.sleep(_LOOK_EVERY)
        return error

    def _wait_for(self, topic: str, rank: int) -> Json:
        last, since = None, time.monotonic()
        while (word := self._read(self._key(topic, rank))) is None:
            if failure := self._read(f"failed/{rank}"):
                raise UserError(f"process {rank} of {self.world.size} has stopped: {failure}")
            beat = self._read(f"beat/{rank}")
            if beat != last:
                last, since = beat, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise UserError(
                    f"process {rank} of {self.world.size} has shown no sign of life for "
                    f"{self.patience:g} s: what is finished is kept; start the same command again"
                )
            time.sleep(_LOOK_EVERY)
        return json.loads(word)

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _key(self, topic: str, rank: int) -> str:
        return f"{self._round}/{topic}/{rank}"

    def _lost(self) -> UserError:
        return UserError(
            f"process {self.world.rank} has lost the launcher's store, so another process or machine "
            "has stopped: what is finished is kept; start the same command again"
        )

    def _beat(self) -> None:
        for count in itertools.count():
            try:
                self.store.set(f"beat/{self.world.rank}", str(count))
            except RuntimeError:
                return  # whoever waits will notice and say so
            if self._left.wait(_BEAT_EVERY):
                return


def _open_store(world: World, url: str) -> dist.Store:
    try:
        timeout = timedelta(seconds=_STORE_TIMEOUT)
        store, _, _ = next(rendezvous(url, world.rank, world.size, timeout=timeout))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {world.rank} of {world.size} cannot meet the others at {url} ({reason}): start "
            "them with torchrun"
        ) from error
    return dist.PrefixStore("meeting", store)


def start(meeting: Meeting, device: torch.device) -> None:
    """Join the process group: nccl on CUDA, gloo elsewhere. One process joins nothing."""
    world = meeting.world
    if world.size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", meeting.store)
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
