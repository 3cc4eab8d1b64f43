"""What a C library prints for itself does not reach standard output, and nothing else is lost with it."""

from __future__ import annotations

import ctypes
import os

import pytest

from twinpilots.stray_output import muted


def test_the_librarys_lines_are_dropped_and_all_others_arrive_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    print("before")
    with muted(b"Highs"):
        libc.printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        os.write(1, b"another thread's line\n")
        libc.puts(b"HighsLp is short")
        print("ours")
    print("after")
    libc.puts(b"Highs again")
    libc.fflush(None)
    out = capfd.readouterr().out.splitlines()
    assert sorted(out) == sorted(["before", "another thread's line", "ours", "after", "Highs again"])
    assert out.index("before") < out.index("ours") < out.index("after")


def test_it_ends_with_an_error_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), muted(b"Highs"):
        print("ours")
        raise ZeroDivisionError
    print("after")
    assert capfd.readouterr().out == "ours\nafter\n"


def test_nothing_is_needed_where_there_is_no_standard_output() -> None:
    kept = os.dup(1)
    os.close(1)
    try:
        with muted(b"Highs"):
            pass
        with pytest.raises(OSError):
            os.fstat(1)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
