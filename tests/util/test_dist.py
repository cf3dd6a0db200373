"""Processes that meet, in threads of one process and over a store of their own."""

import threading
import time

import pytest
from torch.distributed import TCPStore

from util import dist
from util.errors import UserError


@pytest.fixture
def meetings(monkeypatch):
    """Two Rendezvous over one store; the second must be entered by the test."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(world, url):
        return TCPStore("127.0.0.1", server.port, is_master=False)

    monkeypatch.setattr(dist, "_open_store", join)
    monkeypatch.setattr(dist, "_BEAT_EVERY", 0.05)
    return [dist.Rendezvous(dist.World(rank, 2), patience=0.5) for rank in range(2)]


def test_one_process_meets_itself():
    with dist.Rendezvous() as rendezvous:
        rendezvous.next_round()
        rendezvous.publish("made", {"images": 3})
        assert rendezvous.wait("made") == [{"images": 3}]


def test_words_arrive_by_rank_and_every_round_has_its_own(meetings):
    first, second = meetings
    with first, second:
        for turn in range(2):
            for rendezvous in meetings:
                rendezvous.next_round()
            first.say("made", turn)
            threading.Timer(0.1, second.say, ("made", -turn)).start()
            assert first.wait("made") == [turn, -turn]
            assert second.wait("made", ranks=[0]) == [turn]


def test_a_process_that_lives_is_waited_for_longer_than_patience(meetings):
    first, second = meetings
    with first, second:
        threading.Timer(1.2, second.say, ("made", 7)).start()
        assert first.wait("made", ranks=[1]) == [7]


def test_a_process_that_shows_no_life_ends_the_wait_with_a_sentence(meetings):
    began = time.monotonic()
    with meetings[0] as first, pytest.raises(UserError, match="process 1 of 2 has shown no sign"):
        first.say("made")
        first.wait("made")
    assert time.monotonic() - began < 20


def test_the_sentence_of_a_process_that_failed_reaches_the_others(meetings):
    first, second = meetings
    with first:
        with pytest.raises(UserError), second:
            raise UserError("no space left")
        with pytest.raises(UserError, match="process 1 of 2 has stopped: no space left"):
            first.wait("made", ranks=[1])


def test_a_failed_collective_is_blamed_on_the_process_that_stopped(meetings, monkeypatch):
    monkeypatch.setattr(dist, "_BLAME_WITHIN", 0.2)
    first, second = meetings
    error = RuntimeError("connection closed by peer")
    with first:
        assert first.blame(error) is error
        with pytest.raises(UserError), second:
            raise UserError("a.png cannot be read")
        assert "process 1 of 2 has stopped: a.png cannot be read" in str(first.blame(error))
    assert dist.Rendezvous().blame(error) is error


def test_a_lost_store_is_a_sentence(meetings, monkeypatch):
    with meetings[0] as first:

        class Lost:
            def check(self, *arguments):
                raise RuntimeError("connection reset")

            set = get = check

        first.store = Lost()
        for call in (lambda: first.say("made"), lambda: first.wait("made")):
            with pytest.raises(UserError, match="lost the launcher's store"):
                call()


def test_a_launcher_that_cannot_be_reached_is_a_sentence(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"process 1 of 2 cannot meet the others at env://"):
        dist.Rendezvous(dist.World(1, 2))
