"""Memory is a promise: arenas never hand out what they lack, the ledger never counts past a limit, and closing gives everything back."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpilots.device.memory import GpuArena, HostArena, Ledger, host_memory_available_bytes
from twinpilots.errors import LimitError
from twinpilots.kernels.abi import ABI_VERSION, CONTROL, EVENTS_OFFSET
from twinpilots.units import format_bytes, parse_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("8GiB", 8 * 2**30), ("512KiB", 512 * 2**10), ("24GB", 24 * 10**9), ("1.5 mib", 3 * 2**19), ("77", 77), ("77B", 77), (77, 77)]
)
def test_sizes_are_read_as_written(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "8G", "GiB", "-1GiB", "1e9", "nan", "8 GiB of RAM", "0", 0, -5, True, 1.5, None])
def test_a_size_that_is_not_one_is_refused_by_name(text: object) -> None:
    with pytest.raises(ValueError, match="memory size"):
        parse_bytes(text)  # type: ignore[arg-type]


@given(st.integers(1, 2**50))
def test_a_printed_size_is_read_back_within_its_digits(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.051)


def test_printed_sizes() -> None:
    assert [format_bytes(n) for n in (512, 84 * MIB, 3 * 2**29, 1000)] == ["512 B", "84 MiB", "1.5 GiB", "1000 B"]


def test_the_ledger_refuses_the_byte_past_the_limit_and_remembers_its_peak() -> None:
    ledger = Ledger({"gpu": 100})
    ledger.add("gpu", "weights", 60)
    ledger.add("gpu", "ring", 40)
    with pytest.raises(LimitError, match=r"kv needs 1 B of gpu memory, 0 B .* 100 B.*--gpu-memory to at least 101 bytes"):
        ledger.add("gpu", "kv", 1)
    ledger.remove("gpu", "ring", 40)
    ledger.add("host", "kv", 10**15)  # no limit given for this tier
    assert (ledger.used("gpu"), ledger.peak("gpu"), ledger.by_purpose("gpu")) == (60, 100, {"weights": 60, "ring": 0})
    ledger.check_integrity()


def test_the_ledger_refuses_nonsense() -> None:
    ledger = Ledger({})
    for action in (
        lambda: ledger.add("gpu", "toys", 1),  # type: ignore[arg-type]
        lambda: ledger.add("moon", "kv", 1),  # type: ignore[arg-type]
        lambda: ledger.add("gpu", "kv", -1),
        lambda: ledger.remove("gpu", "kv", 1),
    ):
        with pytest.raises(ValueError, match=r"cannot|is not one of"):
            action()


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 2, 64, 256]), st.sampled_from(["weights", "kv"])), max_size=40))
def test_allocations_are_aligned_disjoint_within_the_arena_and_all_counted(requests: list[tuple[int, int, str]]) -> None:
    ledger = Ledger({"gpu": 3000})
    arena, end = GpuArena(4000, ledger=ledger), 0
    for num_bytes, align, purpose in requests:
        try:
            offset = arena.alloc(num_bytes, purpose, align)  # type: ignore[arg-type]
        except LimitError:
            assert -(-end // align) * align + num_bytes > 3000
            continue
        assert offset % align == 0 and offset >= end
        end = offset + num_bytes
        assert arena.used == end == ledger.used("gpu")
        arena.check_integrity()
    arena.close()
    assert ledger.used("gpu") == 0


def test_a_full_arena_names_what_is_left_and_what_to_raise() -> None:
    message = r"kv needs 1 MiB, .* KiB of the host arena's 1 MiB are left; raise --host-memory by at least \d+ bytes"
    with HostArenaClosing(MIB) as arena, pytest.raises(LimitError, match=message):
        arena.alloc(MIB, "kv")


class HostArenaClosing:
    """An arena for one `with` block."""

    def __init__(self, num_bytes: int, shared: bool = True, ledger: Ledger | None = None) -> None:
        self.arena = HostArena(num_bytes, shared, num_events=16, ledger=ledger)

    def __enter__(self) -> HostArena:
        return self.arena

    def __exit__(self, *_: object) -> None:
        self.arena.close()


@pytest.mark.parametrize("shared", [True, False])
def test_the_host_arena_starts_with_control_and_events_and_reads_zero(shared: bool) -> None:
    with HostArenaClosing(MIB, shared) as arena:
        offset = arena.alloc(100, "weights")
        assert offset >= EVENTS_OFFSET + 4 * 16 and offset % 64 == 0
        assert not arena.view(offset, np.float32, (5, 5)).any()
        assert int(arena.view(0, CONTROL, ())["abi"]) == ABI_VERSION
        arena.events[3] = 7
        assert arena.view(EVENTS_OFFSET + 12, np.uint32, 1)[0] == 7
        assert arena.base == arena.bytes.ctypes.data
        assert not arena.aborted
        arena.set_abort()
        assert arena.aborted
        arena.check_integrity()
        with pytest.raises(ValueError, match="leaves the host arena"):
            arena.view(MIB - 4, np.float32, (2,))


def test_two_mappings_of_one_arena_see_the_same_bytes() -> None:
    with HostArenaClosing(MIB) as arena:
        other = HostArena.attach(os.dup(arena.fd), arena.num_bytes, num_events=16)
        arena.bytes[-1] = 42
        assert other.bytes[-1] == 42
        with pytest.raises(LimitError):
            other.alloc(1, "kv")
        other.close()


def test_untouched_memory_costs_nothing_and_closing_gives_back_fd_and_bytes() -> None:
    before = set(os.listdir("/proc/self/fd"))
    ledger = Ledger({"host": 2**40})
    arena = HostArena(2**36, num_events=16, ledger=ledger)  # more than this box has: it must not be touched
    offset = arena.alloc(4 * MIB, "weights")
    arena.view(offset, np.uint8, 4 * MIB)[:] = 1
    view = arena.view(offset, np.uint8, 4 * MIB)
    arena.close()
    arena.close()
    assert not view.any(), "a forgotten view must not keep the memory"
    assert ledger.used("host") == 0 and ledger.peak("host") >= 4 * MIB
    del view
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_arena_that_begins_anew_keeps_its_bytes_but_no_allocation_event_or_command() -> None:
    first, second = Ledger({}), Ledger({"host": MIB})
    arena = HostArena(MIB, shared=False, num_events=8, ledger=first)
    data = arena.alloc(100_000, "weights")
    arena.view(data, np.uint8, 100_000)[:] = 7
    arena.events[3] = 5
    arena.set_abort()
    arena.renew(second)
    assert not arena.aborted and not arena.events.any() and first.used("host") == 0
    assert second.used("host") == arena.used < 100_000, "control block and events, counted by the new ledger alone"
    assert arena.alloc(100_000, "weights") == data and (arena.view(data, np.uint8, 100_000) == 7).all()
    arena.close()
    assert second.used("host") == 0


def test_an_arena_too_small_for_its_control_block_is_refused() -> None:
    with pytest.raises(LimitError, match="control block"):
        HostArena(1000, num_events=16)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 100 kB\nMemAvailable:    1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5", "sys/fs/cgroup/memory.stat": "file 3"},
            1000 * 1024,
        ),
        (  # v2: the parent's limit binds; droppable page cache counts as room
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "4500", "sys/fs/cgroup/a/memory.stat": "inactive_file 100",
                "sys/fs/cgroup/a/b/memory.max": "9000", "sys/fs/cgroup/a/b/memory.current": "10", "sys/fs/cgroup/a/b/memory.stat": "",
            },
            600,
        ),
        (  # v1 in a container: the named path is not mounted, the mount's root is the own group
            {
                "proc/self/cgroup": "4:memory:/host/path\n3:cpu:/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000", "sys/fs/cgroup/memory/memory.usage_in_bytes": "7000",
                "sys/fs/cgroup/memory/memory.stat": "cache 5\ninactive_file 0",
            },
            1000,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "10", "sys/fs/cgroup/memory.current": "50", "sys/fs/cgroup/memory.stat": ""}, 0),
    ],
)  # fmt: skip
def test_available_memory_respects_the_kernel_and_every_cgroup(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, {**MEMINFO, **files})
    assert host_memory_available_bytes(tmp_path) == expected


def test_available_memory_of_this_machine_is_plausible() -> None:
    assert 2**20 < host_memory_available_bytes() < 2**50
