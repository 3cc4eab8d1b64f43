"""This machine's cores as the kernel describes them: physical cores, their speed, their NUMA nodes, and how many of them a cgroup lets us keep busy.

Owns the reading of sysfs, the order in which cores are taken, and their division into disjoint groups. Knows nothing of pools or pilots.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twinpilots.device.memory import cgroup_directories

SYSFS_CPUS = Path("/sys/devices/system/cpu")
SAME_KIND_FRAC = 0.9  # cores of one kind differ by a few per cent (favoured cores); a hybrid's slower kinds reach at most 0.81 of the fastest


@dataclass(frozen=True, kw_only=True)
class CoreInfo:
    """One logical CPU: ``core`` names its physical core (the lowest sibling), ``speed`` orders cores by what they can do (any unit)."""

    cpu: int
    core: int
    speed: float
    node: int = 0


def allowed_cpus() -> set[int]:
    """Logical CPUs that this process may run on: online, in its affinity mask, in its cpuset."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def read_topology(cpus: Iterable[int], sysfs: Path = SYSFS_CPUS) -> list[CoreInfo]:
    """What the kernel says about ``cpus``. Where it says nothing, each is a core of its own, on node 0, and all are equally fast."""
    infos, nodes = [], _nodes_of_cpus(sysfs)
    for cpu in sorted(cpus):
        directory = sysfs / f"cpu{cpu}"
        siblings = _text(directory / "topology/core_cpus_list") or _text(directory / "topology/thread_siblings_list") or str(cpu)
        # Either may be missing, and with hyper-threading the kernel gives all of a hybrid's cores one capacity: their product orders in every case.
        speed = float(_text(directory / "cpu_capacity") or 1) * float(_text(directory / "cpufreq/cpuinfo_max_freq") or 1)
        infos.append(CoreInfo(cpu=cpu, core=min(parse_cpu_list(siblings)), speed=speed, node=nodes.get(cpu, 0)))
    return infos


def physical_cores(infos: Iterable[CoreInfo]) -> tuple[CoreInfo, ...]:
    """One logical CPU of each physical core, the fastest kind first, and inside a kind node by node: the first N lie on as few nodes as they can."""
    best: dict[int, CoreInfo] = {}
    for info in sorted(infos, key=lambda info: info.cpu):
        best.setdefault(info.core, info)
    ordered: list[CoreInfo] = []
    left = sorted(best.values(), key=lambda info: (-info.speed, info.cpu))
    while left:
        kind = [info for info in left if info.speed >= SAME_KIND_FRAC * left[0].speed]
        ordered += sorted(kind, key=lambda info: (info.node, info.cpu))
        left = left[len(kind) :]
    return tuple(ordered)


def core_groups(infos: Iterable[CoreInfo], count: int) -> tuple[tuple[int, ...], ...]:
    """All physical cores in ``count`` disjoint groups, one for each GPU's worker. A group lies on one node unless there are more nodes than groups;
    the groups of a node share its fast and its slow cores evenly. ValueError when there are fewer cores than groups."""
    cores = physical_cores(infos)
    if not 1 <= count <= len(cores):
        raise ValueError(f"{len(cores)} physical cores cannot make {count} groups")
    nodes = [[info.cpu for info in cores if info.node == node] for node in sorted({info.node for info in cores})]
    shares = [0] * len(nodes)
    for _ in range(count):  # the next group goes where it gets the most cores
        shares[max(range(len(nodes)), key=lambda i: len(nodes[i]) / (shares[i] + 1))] += 1
    groups = [node[i::share] for node, share in zip(nodes, shares, strict=True) for i in range(share)]
    for node in sorted((node for node, share in zip(nodes, shares, strict=True) if not share), key=len, reverse=True):
        min(groups, key=len).extend(node)
    return tuple(tuple(group) for group in groups)


def memory_nodes(cpus: Sequence[int], sysfs: Path = SYSFS_CPUS) -> tuple[int, ...]:
    """The NUMA nodes on which what ``cpus`` read should lie; none on a machine with one node, where there is nothing to choose."""
    root = sysfs.parent / "node"
    with_memory = parse_cpu_list(_text(root / "has_memory") or _text(root / "online") or "0")
    if len(with_memory) < 2:
        return ()
    nodes = _nodes_of_cpus(sysfs)
    return tuple(sorted({nodes.get(cpu, 0) for cpu in cpus} & set(with_memory)))


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Whole cores' worth of time that the cgroups (v1 or v2) leave this process, at least 1; None without a limit. More busy threads than that are
    all stopped for the rest of each period."""
    rooms = [_quota(directory) for directory in cgroup_directories("cpu", root)]
    least = min((room for room in rooms if room is not None), default=None)
    return None if least is None else max(1, int(least))


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format: "0-2,8" is [0, 1, 2, 8]."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _quota(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    if quota in ("", "max", "-1") or not period:
        return None
    return int(quota) / int(period)


def _nodes_of_cpus(sysfs: Path) -> dict[int, int]:
    """The node of each logical CPU; empty on a kernel without NUMA."""
    nodes: dict[int, int] = {}
    for directory in (sysfs.parent / "node").glob("node[0-9]*"):
        cpus = _text(directory / "cpulist")
        nodes |= dict.fromkeys(parse_cpu_list(cpus) if cpus else (), int(directory.name.removeprefix("node")))
    return nodes


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
