"""A process's turns against a dealer made by hand."""

from __future__ import annotations

import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldmperf.profiling import Case, profile
from ldmperf.profiling.measure.timing import Deadline, RepetitionRule, Timed, interleave
from ldmperf.profiling.measure.turn import ASKED, TURNS, TURNS_VARIABLE, WAITING_VARIABLE, Turns, granted, named
from ldmperf.profiling.trajectory.checkpoints import identified

Deal = Callable[[Callable[[socket.socket], None]], None]


@pytest.fixture
def deal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deal]:
    """Accepts one connection at a socket that LDMPERF_TURNS names, and serves it in a thread."""
    threads = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        # pytest's folders have longer names than a socket may have.
        monkeypatch.chdir(tmp_path)
        listener.bind("turns")
        listener.listen()
        monkeypatch.setenv(TURNS_VARIABLE, "turns")

        def serve(how: Callable[[socket.socket], None]) -> None:
            def serving() -> None:
                with listener.accept()[0] as connection:
                    how(connection)

            threads.append(threading.Thread(target=serving))
            threads[-1].start()

        yield serve
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_without_a_dealer_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TURNS_VARIABLE, raising=False)
    turns = Turns()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turns.end()
    assert (turns.waited, turns.waiting) == (0.0, frozenset())


def test_a_turn_ends_with_a_byte_and_begins_with_a_line_of_who_waits(
    deal: Deal, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bytes] = []

    def dealer(connection: socket.socket) -> None:
        for waiting in ([], [12, 345]):
            heard.append(connection.recv(9))
            time.sleep(0.05)
            connection.sendall(granted(waiting))

    turns = Turns()
    deal(dealer)
    # During its first turn, which it has not asked for.
    monkeypatch.setenv(WAITING_VARIABLE, named([7, 8]))
    assert turns.waiting == {7, 8}
    turns.end()
    assert turns.waiting == frozenset()
    assert turns.waited >= 0.05
    turns.end()
    assert turns.waiting == {12, 345}
    assert turns.waited >= 0.1
    assert heard == [ASKED, ASKED]


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_dealer_that_ends_is_an_interrupt(deal: Deal, is_reset: bool) -> None:
    """Nobody is left for whom to go on, and the other side would go on too, beside this one."""

    def dealer(connection: socket.socket) -> None:
        if not is_reset:
            connection.recv(1)

    deal(dealer)
    with pytest.raises(KeyboardInterrupt, match="whoever dealt turns at turns has ended"):
        Turns().end()


def test_a_dealer_that_ends_during_a_turn_is_an_interrupt(deal: Deal) -> None:
    ended = threading.Event()

    def dealer(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(granted([]))
        connection.close()
        ended.set()

    deal(dealer)
    turns = Turns()
    turns.end()
    assert ended.wait(10)
    with pytest.raises(KeyboardInterrupt, match="whoever dealt turns at turns has ended"):
        turns.end()


def test_an_address_at_which_nobody_listens_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TURNS_VARIABLE, "/nowhere/turns")
    turns = Turns()
    with pytest.warns(UserWarning, match=r"LDMPERF_TURNS: /nowhere/turns deals no turns \(No such file.*unset it"):
        turns.end()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        turns.end()


def test_a_turn_is_asked_for_before_each_round_and_no_deadline_passes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    now = [100.0]

    def end(self: Turns) -> None:
        ran.append("turn")
        now[0] += 50.0
        self.waited += 50.0

    def sample(name: str) -> Callable[[int, bool], Timed[object]]:
        def taken(number: int, is_last: bool) -> Timed[object]:
            ran.append(name)
            now[0] += 1.0
            return Timed(None, 1e3, None)

        return taken

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(TURNS, "waited", 0.0)
    monkeypatch.setattr(Turns, "end", end)
    whole = Deadline(7.0)
    times = interleave(
        {name: sample(name) for name in "ab"},
        RepetitionRule(9, 0.0),
        lambda name, failure: pytest.fail(str(failure)),
        deadline=whole.after(0.5),
    )
    assert ran == ["turn", "a", "b", "turn", "b", "a"]
    assert [len(taken.wall_ms) for taken in times.values()] == [2, 2]
    assert whole.left == 3.0


@pytest.mark.parametrize("waited", [0.0, 2.5])
def test_a_record_says_whether_others_had_turns(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, waited: float
) -> None:
    monkeypatch.setattr(TURNS, "waited", waited)
    case = Case(unet=str(tiny_checkpoint), steps=1, latent_height=8, latent_width=8, guidance_scale=1.0)
    (record,) = profile(identified([case]), rule=RepetitionRule(1, 0.0))
    assert record.harness is not None
    assert record.harness.in_turns == (waited > 0)
