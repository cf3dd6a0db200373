"""Work that may fail in some processes of a run ends in all of them, and the run continues."""

import threading

import pytest
from torch.distributed import TCPStore

from util import dist
from util.errors import UserError


@pytest.fixture
def pair(monkeypatch):
    """Two Rendezvous over one store, entered."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    join = lambda world, url: TCPStore("127.0.0.1", server.port, is_master=False)  # noqa: E731
    monkeypatch.setattr(dist, "_open_store", join)
    first, second = (dist.Rendezvous(dist.World(rank, 2), patience=5) for rank in range(2))
    with first, second:
        yield first, second


def in_two_threads(pair, work):
    """work(rendezvous) in both processes, and what each returned or raised."""
    found = {}

    def run(rendezvous):
        try:
            found[rendezvous.world.rank] = work(rendezvous)
        except Exception as error:
            found[rendezvous.world.rank] = error

    threads = [threading.Thread(target=run, args=(each,)) for each in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found[0], found[1]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("rounds", [0, 1, 2], ids="before round {}".format)
def test_a_failure_in_one_process_ends_the_attempt_in_both(pair, failing, rounds):
    def work(rendezvous):
        with pytest.raises(UserError) as error, rendezvous.attempt():
            for number in range(3):
                if (rendezvous.world.rank, number) == (failing, rounds):
                    raise UserError("2 of 2 images contain NaN")
                rendezvous.next_round()
                rendezvous.publish("made", number)
                rendezvous.wait("made")
        with rendezvous.attempt():
            rendezvous.next_round()
            rendezvous.publish("made", "again")
            assert rendezvous.wait("made") == ["again", "again"]
        return str(error.value)

    said = in_two_threads(pair, work)
    assert said[failing] == "2 of 2 images contain NaN"
    assert said[1 - failing] == f"process {failing} of 2 has failed: 2 of 2 images contain NaN"


def test_an_attempt_of_one_process_passes_its_error_on():
    with dist.Rendezvous() as rendezvous:
        with pytest.raises(ZeroDivisionError), rendezvous.attempt():
            raise ZeroDivisionError
        rendezvous.publish("made", 1)
        assert rendezvous.wait("made") == [1]
