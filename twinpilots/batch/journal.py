"""The output file: records appended as requests finish, on the disk within a second, and read back after a crash.

Owns the file, its lock, and which lines of the input are done (one bit each). Knows nothing of what is in a record beyond its line and its run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

from twinpilots.errors import TwinPilotsError, UserError

SYNC_S = 1.0  # at most so much finished work can be lost to a power cut; a killed process loses none
READ_BYTES = 1 << 20


class Record(NamedTuple):
    """The answer to one line, as JSON without its newline; ``failed``: an error record."""

    line: int
    data: bytes
    failed: bool


class DoneLines:
    """A set of line numbers from 1 to ``num_lines``: one bit each."""

    def __init__(self, num_lines: int) -> None:
        self.num_lines = num_lines
        self._bits = bytearray(num_lines // 8 + 1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, line: int) -> bool:
        return 1 <= line <= self.num_lines and bool(self._bits[line >> 3] & 1 << (line & 7))

    def add(self, line: int) -> None:
        """Count a line; ValueError when it is beyond the file or counted already."""
        if line in self or not 1 <= line <= self.num_lines:
            raise ValueError(f"line {line} of {self.num_lines} {'is there twice' if line in self else 'does not exist'}")
        self._bits[line >> 3] |= 1 << (line & 7)
        self._count += 1


class Journal:
    """The output of one run: open and locked from the start; `begin` it or `resume` it before anything is appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = DoneLines(0)
        self.num_failed = 0  # of those done, the ones that are error records
        self._fd = open_output(path)
        self._end = os.fstat(self._fd).st_size
        self._unsynced_since: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._end == 0

    def begin(self, num_lines: int) -> None:
        """An empty output for an input of so many lines, whatever was there before."""
        self.done, self.num_failed = DoneLines(num_lines), 0
        self._cut(0)

    def resume(self, num_lines: int, run_id: str) -> None:
        """Take in what is done already. ``run_id`` begins the id of every record. Raises UserError when the file holds something else.

        A crash can only have torn the end of the file: that is cut off. What is broken before a good record is not our doing.
        """
        self.done, self.num_failed = DoneLines(num_lines), 0
        end, torn = 0, 0
        with open(os.dup(self._fd), "rb", buffering=READ_BYTES) as stream:
            stream.seek(0)
            for number, data in enumerate(stream, 1):
                record = _record(data)
                if record is None:
                    torn = torn or number
                    continue
                problem = f"line {torn} is no record, and good ones follow" if torn else self._note(record, run_id)
                if problem:
                    raise UserError(f"output {self.path} is damaged: {problem} (line {number}); move it away, or pass --overwrite to begin anew")
                end += len(data)
        self._cut(end)

    def _note(self, record: dict[str, Any], run_id: str) -> str | None:
        """Mark the record's line as done, or say why it is none of ours."""
        if not str(record.get("id")).startswith(run_id) or not isinstance(record.get("line"), int):
            return "it holds a record of another run"
        try:
            self.done.add(record["line"])
        except ValueError as error:
            return str(error)
        self.num_failed += record.get("error") is not None
        return None

    def _cut(self, end: int) -> None:
        try:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)
        except OSError as error:
            raise UserError(f"output {self.path} cannot be written: {error.strerror}; give another -o") from error
        self._end = end

    # -- appending ---------------------------------------------------------------------------------------------------------------------------

    def append(self, records: list[Record]) -> None:
        """Write the records of finished requests. Raises TwinPilotsError when the disk is full, the file then as it was before."""
        if not records:
            return
        chunk = b"".join(record.data + b"\n" for record in records)
        try:
            self._write(chunk)
        except OSError as error:
            os.ftruncate(self._fd, self._end)  # half a record would only be cut off later
            raise TwinPilotsError(self._failure(error)) from error
        for record in records:
            self.done.add(record.line)
            self.num_failed += record.failed
        self._end += len(chunk)
        if self._unsynced_since is None:
            self._unsynced_since = time.monotonic()

    def _write(self, chunk: bytes) -> None:
        os.lseek(self._fd, self._end, os.SEEK_SET)
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._fd, view) :]

    def sync_if_due(self) -> None:
        """Bring what was written to the disk, unless that was done less than `SYNC_S` ago."""
        if self._unsynced_since is not None and time.monotonic() - self._unsynced_since >= SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Bring everything written to the disk. Raises TwinPilotsError when the disk refuses."""
        if self._unsynced_since is None:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise TwinPilotsError(self._failure(error)) from error
        self._unsynced_since = None

    def _failure(self, error: OSError) -> str:
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "repair that"
        return f"output {self.path} cannot be written: {error.strerror}; its {len(self.done)} records are safe: {advice} and run the same command again"

    def close(self) -> None:
        """Sync, unlock and close."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _record(data: bytes) -> dict[str, Any] | None:
    """The record in a line of the output; None when it is cut off or no JSON."""
    try:
        record = json.loads(data) if data.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def open_output(path: Path) -> int:
    """The file, created when it is not there, open for reading and writing and locked. UserError when that cannot be."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}; give another -o") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"output {path} is not a regular file; a run that can be resumed needs one")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(f"output {path} is being written by another run; wait for it, or give another -o") from None
    except BaseException:
        os.close(fd)
        raise
    return fd
