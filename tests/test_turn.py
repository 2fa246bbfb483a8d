"""A process's turns against a dealer made by hand."""

from __future__ import annotations

import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldmperf.profiling.measure.timing import Deadline, RepetitionRule, Timed, interleave
from ldmperf.profiling.measure.turn import ASKED, TURNS_VARIABLE, Turns, granted

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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Turns().end() == 0.0


def test_a_turn_ends_with_a_byte_and_begins_with_a_line_of_who_waits(deal: Deal) -> None:
    heard: list[bytes] = []

    def dealer(connection: socket.socket) -> None:
        for others in ([], [12, 345]):
            heard.append(connection.recv(9))
            connection.sendall(granted(others))

    turns = Turns()
    deal(dealer)
    assert turns.end() > 0.0
    assert turns.others == frozenset()
    turns.end()
    assert turns.others == {12, 345}
    assert heard == [ASKED, ASKED]


def test_a_dealer_that_ends_is_a_warning_and_the_process_goes_on_alone(deal: Deal) -> None:
    def dealer(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(granted([7]))
        connection.recv(1)

    turns = Turns()
    deal(dealer)
    turns.end()
    with pytest.warns(UserWarning, match=r"LDMPERF_TURNS: turns deals no turns \(it has ended\); unset it"):
        turns.end()
    assert turns.others == frozenset()
    assert turns.end() == 0.0


def test_an_address_at_which_nobody_listens_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TURNS_VARIABLE, "/nowhere/turns")
    turns = Turns()
    with pytest.warns(UserWarning, match="/nowhere/turns deals no turns"):
        turns.end()
    assert turns.end() == 0.0


def test_a_turn_is_asked_for_before_each_round_and_the_deadline_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    now = [0.0]

    def end() -> float:
        ran.append("turn")
        now[0] += 50.0
        return 50.0

    def sample(name: str) -> Callable[[int, bool], Timed[object]]:
        def taken(number: int, is_last: bool) -> Timed[object]:
            ran.append(name)
            now[0] += 1.0
            return Timed(None, 1e3, None)

        return taken

    monkeypatch.setattr("ldmperf.profiling.measure.timing.TURNS.end", end)
    times = interleave(
        {name: sample(name) for name in "ab"},
        RepetitionRule(9, 0.0),
        lambda name, failure: pytest.fail(str(failure)),
        deadline=Deadline(3.5, lambda: now[0]),
    )
    assert ran == ["turn", "a", "b", "turn", "b", "a"]
    assert [len(taken.wall_ms) for taken in times.values()] == [2, 2]
