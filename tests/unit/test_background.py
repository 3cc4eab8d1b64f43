"""Re-solving in a process of its own: it answers, sleeps, dies with its parent, and its death leaves the plans as they are."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from twinpilots.background import Background


@pytest.fixture
def background() -> Iterator[Background]:
    found = Background()
    yield found
    found.close()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: the state first. Empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _until(true: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return found


def _answer(background: Background, call: Callable[[], Any]) -> Any:
    background.submit(call)
    _until(lambda: not background._thread.is_alive())  # type: ignore[union-attr]
    return background.collect()


def test_one_sleeping_process_answers_all_calls_and_goes_with_its_owner(background: Background) -> None:
    assert background.pid is None  # until there is something to solve
    assert _answer(background, partial(sorted, (3, 1, 2))) == [1, 2, 3]
    pid = background.pid
    assert pid is not None
    assert _answer(background, os.getpid) == pid != os.getpid()  # the same one again
    assert os.sched_getscheduler(pid) == os.SCHED_IDLE
    before = _stat(pid)[11:13]  # ticks in user and system mode
    time.sleep(0.2)
    assert _stat(pid)[11:13] == before
    background.close()
    assert not _stat(pid)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_it_runs_where_the_process_may_even_when_a_pinned_thread_starts_it() -> None:
    before = os.sched_getaffinity(0)
    background = Background()
    os.sched_setaffinity(0, {min(before)})
    try:
        _answer(background, os.getpid)
        assert background.pid is not None
        assert os.sched_getaffinity(background.pid) == before
    finally:
        os.sched_setaffinity(0, before)
        background.close()


def test_a_call_that_fails_is_told_and_the_next_one_is_answered(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    assert _answer(background, partial(int, "no number")) == ()
    assert "no number" in caplog.text
    assert _answer(background, partial(int, "7")) == 7


def test_a_death_is_told_once_and_the_plans_stay(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert _answer(background, partial(int, "7")) == 7
    assert background.pid is not None
    os.kill(background.pid, signal.SIGKILL)
    assert _answer(background, partial(int, "8")) == ()
    assert _answer(background, partial(int, "9")) == ()
    assert [record.message.partition(" is gone")[0] for record in caplog.records] == ["the process that looks for better plans"]


def test_closing_gives_up_a_solve_in_progress(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    assert _answer(background, partial(int, "7")) == 7
    background.submit(partial(time.sleep, 60))
    began = time.monotonic()
    background.close()
    assert time.monotonic() - began < 4
    assert caplog.text == ""


def test_it_dies_with_a_parent_that_is_killed_and_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(
        "import os, time\nfrom twinpilots.background import Background\nb = Background()\nb.submit(os.getpid)\n"
        "while b._thread.is_alive(): time.sleep(0.01)\nprint(b.collect(), flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))))}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _stat(child)[1] == str(parent.pid)
        parent.kill()
    _until(lambda: _stat(child)[:1] in ([], ["Z"]))
