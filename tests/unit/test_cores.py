"""The pilot takes the right cores of any machine, and its memory lies where those cores read it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import pytest

from twinpilots.device import numa
from twinpilots.device.cpu import CoreChoice, CpuPilot, assign_cores
from twinpilots.device.memory import HostArena
from twinpilots.device.topology import CoreInfo, core_groups, cpu_quota, memory_nodes, parse_cpu_list, physical_cores, read_topology
from twinpilots.doctor import describe_cores, examine

MIB = 2**20


def cores(*speeds: float, threads: int = 1, nodes: Sequence[int] = (0,)) -> list[CoreInfo]:
    """Cores of these speeds in the order of their numbers; their second threads follow them all. Nodes by turns, as some firmware counts."""
    count = len(speeds)
    return [
        CoreInfo(cpu=core + thread * count, core=core, speed=speed, node=nodes[core % len(nodes)])
        for core, speed in enumerate(speeds) for thread in range(threads)
    ]  # fmt: skip


def machine(root: Path, cpus: Sequence[tuple[str, int, int]], nodes: Sequence[str] = (), has_memory: str = "") -> Path:
    """A sysfs tree: (siblings, capacity, maximal frequency; 0: no such file) of each CPU, the CPUs of each node. Returns its .../cpu."""
    files = {f"node/node{node}/cpulist": text for node, text in enumerate(nodes)} | ({"node/has_memory": has_memory} if has_memory else {})
    for cpu, (siblings, capacity, frequency) in enumerate(cpus):
        files |= {f"cpu/cpu{cpu}/topology/core_cpus_list": siblings}
        files |= {f"cpu/cpu{cpu}/cpu_capacity": str(capacity)} if capacity else {}
        files |= {f"cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq": str(frequency)} if frequency else {}
    write(root, files)
    return root / "cpu"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("infos", "gpu", "emulated", "expected"),
    [
        (cores(1, 1), False, False, CoreChoice(pilot=(0, 1))),
        (cores(1, 1), True, True, CoreChoice(pilot=(0,), device=1)),
        (cores(1), True, True, CoreChoice(pilot=(0,), device=0)),
        (cores(1, 1), True, False, CoreChoice(pilot=(0, 1))),
        (cores(1, 1, 1), True, False, CoreChoice(pilot=(0, 1))),
        (cores(1, 1, 2, 2), True, False, CoreChoice(pilot=(2, 3, 0))),  # performance cores first; a slow one is the driver's
        (cores(1, 1, 1, 1, threads=2), False, False, CoreChoice(pilot=(0, 1, 2, 3))),  # one thread per physical core
        (cores(1, 1, 1, 1, threads=2)[3:], True, True, CoreChoice(pilot=(2, 3), device=5)),  # CPU 1 is not ours, its sibling is
        (cores(1, 0.97, 1, 0.98, nodes=(0, 1)), True, False, CoreChoice(pilot=(0, 2, 1))),  # node by node, whichever the firmware favours a little
        (cores(1, 2, 1, 2, nodes=(0, 0, 1, 1)), False, False, CoreChoice(pilot=(1, 3, 0, 2))),  # a fast core far away before a slow one near
    ],
)
def test_cores_are_physical_fastest_first_and_one_is_left_where_it_is_needed(infos: list[CoreInfo], gpu: bool, emulated: bool, expected: CoreChoice) -> None:
    assert assign_cores(infos, gpu=gpu, emulated=emulated) == expected


def test_a_cgroups_quota_is_not_exceeded_by_busy_threads(tmp_path: Path) -> None:
    assert assign_cores(cores(1, 1, 2, 2), gpu=False, emulated=False, most=3) == CoreChoice(pilot=(2, 3, 0))
    assert assign_cores(cores(1, 1, 2, 2), gpu=True, emulated=True, most=2) == CoreChoice(pilot=(2,), device=3)
    assert cpu_quota(tmp_path) is None
    group = {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}
    write(tmp_path, group)
    assert cpu_quota(tmp_path) is None
    write(tmp_path, {"sys/fs/cgroup/a/cpu.max": "350000 100000"})  # the parent's holds for all below it
    assert cpu_quota(tmp_path) == 3
    write(tmp_path, {"sys/fs/cgroup/a/b/cpu.max": "20000 100000"})
    assert cpu_quota(tmp_path) == 1
    old = tmp_path / "v1"
    write(
        old,
        {"proc/self/cgroup": "4:cpu,cpuacct:/\n5:memory:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
    )
    assert cpu_quota(old) == 2
    write(old, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"})
    assert cpu_quota(old) is None


def test_a_kernel_that_says_nothing_gives_equal_cores_on_one_node(tmp_path: Path) -> None:
    infos = read_topology([1, 0], tmp_path / "cpu")
    assert infos == [CoreInfo(cpu=cpu, core=cpu, speed=1, node=0) for cpu in (0, 1)]
    assert memory_nodes([0, 1], tmp_path / "cpu") == ()
    assert parse_cpu_list("0-2,8") == [0, 1, 2, 8]


def test_hyper_threads_of_an_old_kernel_are_one_core(tmp_path: Path) -> None:
    write(tmp_path, {f"cpu/cpu{cpu}/topology/thread_siblings_list": siblings for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"])})
    assert [info.cpu for info in physical_cores(read_topology([1, 2, 3], tmp_path / "cpu"))] == [1, 2]


def test_a_hybrids_performance_cores_come_first_whatever_the_kernel_knows_of_them(tmp_path: Path) -> None:
    slow, fast, favoured = 3_900_000, 5_200_000, 5_400_000
    frequencies_only = [("0", 0, slow), ("1", 0, slow), ("2-3", 0, fast), ("2-3", 0, fast), ("4-5", 0, favoured), ("4-5", 0, favoured)]
    one_capacity = [(siblings, 1024, frequency) for siblings, _, frequency in frequencies_only]  # what the kernel says beside hyper-threading
    capacities = [("0", 640, 0), ("1", 640, 0), ("2", 1024, 0), ("3", 1000, 0)]
    for name, cpus, expected in (("a", frequencies_only, [2, 4, 0, 1]), ("b", one_capacity, [2, 4, 0, 1]), ("c", capacities, [2, 3, 0, 1])):
        infos = read_topology(range(len(cpus)), machine(tmp_path / name, cpus))
        assert [info.cpu for info in physical_cores(infos)] == expected, name


def test_two_nodes_are_read_with_an_offline_core_and_a_restricted_mask(tmp_path: Path) -> None:
    sysfs = machine(tmp_path, [(f"{cpu % 8},{cpu % 8 + 8}", 0, 3_000_000) for cpu in range(16)], ["0-3,8-11", "4-7,12-14"], "0-1")
    mask = [0, 2, 9, 10, 4, 13, 14]  # of the threads 2 and 10 only one counts; 15 is offline, 5 and 6 are theirs by their second thread
    infos = read_topology(mask, sysfs)
    assert [(info.cpu, info.node) for info in physical_cores(infos)] == [(0, 0), (2, 0), (9, 0), (4, 1), (13, 1), (14, 1)]
    assert memory_nodes([0, 2], sysfs) == (0,)
    assert memory_nodes([2, 4], sysfs) == (0, 1)


def test_memory_goes_to_no_node_without_memory_and_nowhere_special_on_one_node(tmp_path: Path) -> None:
    bare = machine(tmp_path / "bare", [("0", 0, 0), ("1", 0, 0), ("2", 0, 0)], ["0", "1", "2"], "0,2")
    assert memory_nodes([0, 1, 2], bare) == (0, 2)
    assert memory_nodes([1], bare) == ()
    one = machine(tmp_path / "one", [("0", 0, 0), ("1", 0, 0)], ["0-1"], "0")
    assert memory_nodes([0, 1], one) == ()


@pytest.mark.parametrize(
    ("infos", "count", "expected"),
    [
        (cores(1, 1, 1, 1), 2, {(0, 2), (1, 3)}),
        (cores(2, 2, 1, 1), 2, {(0, 2), (1, 3)}),  # fast and slow cores are shared evenly
        (cores(*[1] * 8, nodes=(0, 1)), 2, {(0, 2, 4, 6), (1, 3, 5, 7)}),
        (cores(*[1] * 8, nodes=(0, 1)), 4, {(0, 4), (2, 6), (1, 5), (3, 7)}),
        (cores(*[1] * 8, nodes=(0, 1)), 3, {(0, 4), (2, 6), (1, 3, 5, 7)}),  # three equal groups would straddle
        (cores(*[1] * 8, nodes=(0, 1)), 1, {(0, 2, 4, 6, 1, 3, 5, 7)}),
        (cores(*[1] * 8, nodes=(0, 1, 2, 3)), 2, {(0, 4, 2, 6), (1, 5, 3, 7)}),  # whole nodes
        (cores(*[1] * 8, nodes=(0, 0, 0, 0, 0, 0, 0, 1)), 2, {(0, 2, 4, 6), (1, 3, 5, 7)}),  # a node too small for a group of its own
        (cores(1, 1, 1, threads=2), 3, {(0,), (1,), (2,)}),
    ],
)
def test_groups_are_disjoint_even_and_on_one_node_where_they_fit(infos: list[CoreInfo], count: int, expected: set[tuple[int, ...]]) -> None:
    assert {tuple(sorted(group)) for group in core_groups(infos, count)} == {tuple(sorted(group)) for group in expected}


@pytest.mark.parametrize("count", [0, 3])
def test_a_group_without_cores_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"2 physical cores cannot make {count} groups"):
        core_groups(cores(1, 1, threads=2), count)


def test_doctor_shows_nodes_and_groups() -> None:
    assert [finding.name for finding in examine()].count("cores") == 1
    assert describe_cores(cores(1, 1), [(0, 1)]) == "1 NUMA node; 1 group of cores, one for each GPU's worker: 0, 1 (node 0)"
    two = describe_cores(cores(1, 1, 1, 1, nodes=(0, 1)), [(0, 2), (1, 3)])
    assert two.startswith("2 NUMA nodes, host memory interleaved") and two.endswith(
        "2 groups of cores, one for each GPU's worker: 0, 2 (node 0); 1, 3 (node 1)"
    )


# ---- memory policy: the real call. One node is enough to read a policy back.


def policy_of(address: int) -> tuple[int, int]:
    """(mode, nodes as bits) of the memory at ``address``, by get_mempolicy with MPOL_F_ADDR."""
    number = {"x86_64": 239, "aarch64": 236}[platform.machine()]
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * 16)()
    call = ctypes.CDLL(None, use_errno=True).syscall
    if call(ctypes.c_long(number), ctypes.byref(mode), mask, ctypes.c_ulong(1024), ctypes.c_void_p(address), ctypes.c_ulong(2)) != 0:
        pytest.skip(f"get_mempolicy: {os.strerror(ctypes.get_errno())}")
    return mode.value, mask[0]


needs_numa = pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0").exists() or platform.machine() not in ("x86_64", "aarch64"), reason="this kernel has no NUMA policies"
)


@needs_numa
@pytest.mark.parametrize("shared", [False, True])
def test_an_arenas_pages_are_interleaved_also_for_a_process_that_maps_them(shared: bool) -> None:
    arena = HostArena(8 * MIB, shared, num_events=16, nodes=(0,))
    other = HostArena.attach(os.dup(arena.fd), arena.num_bytes, num_events=16) if shared else None
    try:
        assert policy_of(arena.base) == policy_of(arena.base + 8 * MIB - 1) == (3, 1)
        assert other is None or policy_of(other.base + 5 * MIB) == (3, 1)
    finally:
        arena.close()
        if other is not None:
            other.close()


@needs_numa
def test_without_several_nodes_no_policy_is_set(caplog: pytest.LogCaptureFixture) -> None:
    arena = HostArena(MIB, num_events=16)
    try:
        assert policy_of(arena.base)[0] == 0
    finally:
        arena.close()
    assert not caplog.records


@needs_numa
def test_a_kernel_that_refuses_is_named_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    region = mmap.mmap(-1, MIB)
    with caplog.at_level(logging.WARNING):
        assert not numa.interleave(ctypes.addressof(ctypes.c_char.from_buffer(region)), MIB, (1000,))  # no machine has it
    assert "cannot be dealt to NUMA nodes [1000]" in caplog.text


# ---- the pool


def worker_cores() -> list[set[int]]:
    """The cores of every thread of this process that is pinned to one, the caller's left out."""
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return sorted((cpus for cpus in map(os.sched_getaffinity, threads) if len(cpus) == 1), key=min)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_pilot_moves_to_another_group_of_cores() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    before = worker_cores()
    pilot = CpuPilot(cores=(first, second))
    if pilot.native is None:
        pytest.skip("torch's threads take the caller's cores")
    try:
        assert worker_cores() == sorted([*before, {second}], key=min)
        pilot.resize((second,))
        with pilot.caller_pinned():
            assert os.sched_getaffinity(0) == {second}
        assert (pilot.threads, worker_cores()) == (1, before)
        pilot.resize((second, first))
        assert (pilot.threads, worker_cores()) == (2, sorted([*before, {first}], key=min))
    finally:
        pilot.close()
    assert worker_cores() == before
