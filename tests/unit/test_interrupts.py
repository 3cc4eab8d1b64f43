"""Ctrl-C waits for the end of the pass; a second one does not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from twinpilots.runtime.interrupts import Interrupts


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """A suite that a shell runs in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_comes_at_the_end_and_the_handler_is_back():
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: None).held():
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert reached and signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_told_at_once():
    told = []
    with pytest.raises(KeyboardInterrupt), Interrupts(lambda: told.append(True)).held():
        signal.raise_signal(signal.SIGINT)
        assert not told
        signal.raise_signal(signal.SIGINT)
        assert told


def test_an_error_inside_wins_and_the_handler_is_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), Interrupts(lambda: None).held():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    before, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Interrupts(lambda: None).held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


def test_many_sections_share_one_handler_and_between_them_an_interrupt_is_immediate():
    before, reached = signal.getsignal(signal.SIGINT), []
    interrupts = Interrupts(lambda: None)
    with pytest.raises(KeyboardInterrupt), interrupts.listening():
        ours = signal.getsignal(signal.SIGINT)
        for _ in range(2):
            with interrupts.held():
                assert signal.getsignal(signal.SIGINT) is ours is not before
        signal.raise_signal(signal.SIGINT)
        reached.append(True)
    assert not reached and signal.getsignal(signal.SIGINT) is before
