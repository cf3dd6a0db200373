"""Processes that meet, in threads of one process and over a store of their own."""

import threading
import time

import pytest
from torch.distributed import TCPStore

from util import dist
from util.errors import UserError


@pytest.fixture
def pair(monkeypatch):
    """Two Rendezvous over one store; the second must be entered by the test."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(world, url):
        return TCPStore("127.0.0.1", server.port, is_master=False)

    monkeypatch.setattr(dist, "_open_store", join)
    monkeypatch.setattr(dist, "_BEAT_EVERY", 0.05)
    return [dist.Rendezvous(dist.World(rank, 2), patience=0.5) for rank in range(2)]


def test_one_process_receives_its_own_messages():
    with dist.Rendezvous() as rendezvous:
        rendezvous.next_round()
        rendezvous.publish("made", {"images": 3})
        assert rendezvous.wait("made") == [{"images": 3}]


def test_messages_arrive_by_rank_and_every_round_has_its_own(pair):
    first, second = pair
    with first, second:
        for turn in range(2):
            for rendezvous in pair:
                rendezvous.next_round()
            first.publish("made", turn)
            threading.Timer(0.1, second.publish, ("made", -turn)).start()
            assert first.wait("made") == [turn, -turn]
            assert second.wait("made", ranks=[0]) == [turn]


def test_a_process_that_lives_is_waited_for_longer_than_patience(pair):
    first, second = pair
    with first, second:
        threading.Timer(1.2, second.publish, ("made", 7)).start()
        assert first.wait("made", ranks=[1]) == [7]


def test_a_process_that_shows_no_life_ends_the_wait_with_a_sentence(pair):
    began = time.monotonic()
    with pair[0] as first, pytest.raises(UserError, match="process 1 of 2 has shown no sign"):
        first.publish("made")
        first.wait("made")
    assert time.monotonic() - began < 20


def test_the_sentence_of_a_process_that_failed_reaches_the_others(pair):
    first, second = pair
    with first:
        with pytest.raises(UserError), second:
            raise UserError("no space left")
        with pytest.raises(UserError, match="process 1 of 2 has stopped: no space left"):
            first.wait("made", ranks=[1])


def test_a_failed_collective_names_the_process_that_stopped(pair, monkeypatch):
    monkeypatch.setattr(dist, "_FAILURE_WITHIN", 0.2)
    first, second = pair
    error = RuntimeError("connection closed by peer")
    with first:
        with pytest.raises(RuntimeError, match="connection closed by peer"):
            first.raise_peer_failure(error)
        with pytest.raises(UserError), second:
            raise UserError("a.png cannot be read")
        with pytest.raises(UserError, match="process 1 of 2 has stopped: a.png cannot be read"):
            first.raise_peer_failure(error)
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        dist.Rendezvous().raise_peer_failure(error)


def test_a_lost_store_is_a_sentence(pair, monkeypatch):
    with pair[0] as first:

        class Lost:
            def check(self, *arguments):
                raise RuntimeError("connection reset")

            set = get = check

        first.store = Lost()
        for call in (lambda: first.publish("made"), lambda: first.wait("made")):
            with pytest.raises(UserError, match="lost the launcher's store"):
                call()


def test_a_launcher_that_cannot_be_reached_is_a_sentence(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"process 1 of 2 cannot reach the others at env://"):
        dist.Rendezvous(dist.World(1, 2))


def test_a_meeting_file_in_a_folder_that_is_missing_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*absent: create it"):
        dist.Rendezvous(dist.World(0, 2), f"file://{tmp_path}/absent/file")


# ---- work that may fail ------------------------------------------------------------------------------


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

    for rendezvous in pair:
        rendezvous.patience = 5
    with pair[0], pair[1]:
        said = in_two_threads(pair, work)
    assert said[failing] == "2 of 2 images contain NaN"
    assert said[1 - failing] == f"process {failing} of 2 has failed: 2 of 2 images contain NaN"


def test_an_attempt_of_one_process_passes_its_error_on():
    with dist.Rendezvous() as rendezvous:
        with pytest.raises(ZeroDivisionError), rendezvous.attempt():
            raise ZeroDivisionError
        rendezvous.publish("made", 1)
        assert rendezvous.wait("made") == [1]
