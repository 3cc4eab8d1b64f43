"""The link on its own, and what the two sides and the link cost each other when they work at the same time.

Owns those experiments. Knows nothing of how fast a side is alone (`bench.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from twinpilots.device.base import GpuDevice
from twinpilots.hardware.bench import MOST_INSTRUCTIONS, PAGE, Bench, Side, repeated_s
from twinpilots.hardware.effort import Effort
from twinpilots.hardware.profile import LinkProfile
from twinpilots.hardware.rig import Rig, instruction, work_s
from twinpilots.kernels.abi import DTYPE_CODES, NULL, NormKind, Op
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.tasks import STREAMED_KV, RunQueue

PEERS: tuple[tuple[Side, Side], ...] = (("cpu", "gpu"), ("gpu", "cpu"))
HANDOFFS = 100
KV_PAGES = 8  # a short sequence
PROMPT_COPIES = 40  # beside linears of a prompt
CONTENTION_TOKENS = 1  # where the sides wait for memory most, and where sharing a pass gains least
COMPUTING_TOKENS = 64  # where they compute: for as long as reading took
PACKETS_BESIDE = 8
PACKETS_PER_CARD = 128  # a plan's ring is a 32nd of GPU memory, in four packets


class Slowdown(NamedTuple):
    """What a busy link does to work that reads, and to work that computes: a factor on its time."""

    reading: float
    computing: float


def packet_bytes(gpu: GpuDevice | None) -> int:
    """Size of the packets that the link is measured with: a CUDA queue takes tens of microseconds to launch one, so small ones would measure that."""
    return 2 << 20 if gpu is None or gpu.emulated else 32 << 20


def _loads(rig: Rig, size: int, count: int, target: int, sources: Sequence[int]) -> list[tuple[object, ...]]:
    """``count`` packets of ``size`` bytes to ``target``, from each source in turn."""
    table = rig.alloc_host(24 * len(sources))
    rig.host.view(table & ((1 << 56) - 1), np.dtype(np.int64), (len(sources), 3))[:] = [(target, source, size) for source in sources]
    return [instruction(Op.LOAD, (table + 24 * (i % len(sources)), 1, size)) for i in range(count)]


def measure_link(rig: Rig, spec: ModelSpec, runs: int) -> LinkProfile:
    """Bandwidths and fixed costs, by the middle of so many ``runs``."""
    small, big = 64 << 10, packet_bytes(rig.gpu)
    source, target = rig.alloc_host(big), rig.alloc_gpu(big)

    def load_s(size: int) -> float:
        rows = _loads(rig, size, 12, target, [source])

        def per_load() -> float:
            trace = rig.run({"link_in": rows})["link_in"]
            return float(trace[-1, 2] - trace[3, 2]) * 1e-9 / (len(rows) - 4)  # steady state: the link carries its deadline over from packet to packet

        # The middle: a throttled link that a neighbour stalls catches up afterwards, so its quickest runs are too quick.
        return float(np.median([per_load() for _ in range(runs)]))

    rate = big / load_s(big)
    columns, rows = spec.hidden_size, 64 if rig.gpu is None or rig.gpu.emulated else 512  # a real link takes 64 rows in a few microseconds
    near, far = rig.alloc_gpu(4 * columns * rows), rig.alloc_host(4 * columns * rows)

    def copy_s(tokens: int, down: bool) -> float:
        rig.set_tokens(tokens)
        ends = (far, columns, near, columns) if down else (near, columns, far, columns)
        row = instruction(Op.COPY, (*ends, columns, int(down)))
        return repeated_s(lambda: float(np.median(work_s(rig.run({"gpu": [row] * 20})["gpu"]))), 0.02, rig.clock)

    down_s = copy_s(rows, True)
    copy_fixed_s = max(copy_s(1, True) - 4 * columns / rate, 1e-7)
    return LinkProfile(
        up_bytes_per_s=rate, down_bytes_per_s=4 * columns * (rows - 1) / max(down_s - copy_s(1, True), 1e-9), packet_s=max(load_s(small) - small / rate, 0.0),
        copy_s=copy_fixed_s, handoff_s=_handoff_s(rig, near, far, columns, _loads(rig, small, 40, target, [source]), runs),
        queue_handoff_s=_queue_handoff_s(rig, near, columns, target, source, runs),
    )  # fmt: skip


def _handoff_s(rig: Rig, near: int, far: int, columns: int, loads: list[tuple[object, ...]], runs: int) -> float:
    """From a record on one side to the waiting instruction's start on the other: half of a ping-pong's turn, work excluded, while the link is busy as
    in a real pass. On an emulated GPU the link's copies share the core that has to answer."""
    rig.set_tokens(1)
    gain, spare = rig.alloc_host(4 * columns), rig.alloc_host(4 * columns)
    norm = (spare, columns, far, columns, gain, NULL, columns, NormKind.RMS)
    gpu = [instruction(Op.COPY, (far, columns, near, columns, columns, 1), waits=[2 * i] if i else [], record=2 * i + 1) for i in range(HANDOFFS)]
    cpu = [instruction(Op.NORM, norm, (1e-5,), waits=[2 * i + 1], record=2 * i + 2) for i in range(HANDOFFS)]
    return _half_turn_s(rig, {"link_in": loads, "gpu": gpu, "cpu": cpu}, "cpu", runs)


def _half_turn_s(rig: Rig, programs: dict[RunQueue, list[tuple[object, ...]]], answering: RunQueue, runs: int) -> float:
    """What one of HANDOFFS turns between the GPU's compute queue and ``answering`` takes beside the work of both, halved."""

    def per_handoff() -> float:
        traces = rig.run(dict(programs))
        total_s = float(traces[answering][-1, 2] - traces["gpu"][0, 1]) * 1e-9
        return max(0.0, total_s - float(work_s(traces["gpu"]).sum() + work_s(traces[answering]).sum())) / (2 * HANDOFFS)

    return float(np.median([per_handoff() for _ in range(runs)]))


def _queue_handoff_s(rig: Rig, near: int, columns: int, target: int, source: int, runs: int) -> float:
    """As `_handoff_s`, between the GPU's compute queue and a link queue: what streamed KV waits for."""
    rig.set_tokens(1)
    size = 4 << 10
    table = rig.alloc_host(24)
    rig.host.view(table & ((1 << 56) - 1), np.dtype(np.int64), (3,))[:] = (target, source, size)
    norm = (near, columns, near, columns, near, NULL, columns, NormKind.RMS)
    gpu = [instruction(Op.NORM, norm, (1e-5,), waits=[2 * i] if i else [], record=2 * i + 1) for i in range(HANDOFFS)]
    link = [instruction(Op.LOAD, (table, 1, size), waits=[2 * i + 1], record=2 * i + 2) for i in range(HANDOFFS)]
    return _half_turn_s(rig, {"link_in": link, "gpu": gpu}, "link_in", runs)


def with_kv_copies(rig: Rig, bench: Bench, link: LinkProfile) -> LinkProfile:
    """Copies of streamed KV: one at a time, and on an emulated GPU they share its core with the linears between which they fall: of one token, and of as many
    as a prompt's."""
    spec, kv_dtype, tokens = bench.spec, bench.spec.weight_dtype, min(COMPUTING_TOKENS, bench.tokens)
    page_bytes = spec.kv_page_bytes(kv_dtype, PAGE)
    pages = KV_PAGES + -(-tokens // PAGE)
    home, staging = rig.alloc_host(pages * page_bytes), rig.alloc_gpu(pages * page_bytes)
    args = (staging, home, page_bytes, PAGE, spec.num_kv_heads, spec.head_dim, DTYPE_CODES[kv_dtype])
    rows, _ = bench.linears(bench.most_common)

    def beyond_packet_s(op: Op, queue: RunQueue, num_bytes: float, rate: float, count: int) -> float:
        gpu = [row[:7] + (i,) + row[8:] for i, row in enumerate(rows[:count])]  # each records its number
        copies = [instruction(op, args, waits=[i]) for i in range(len(gpu))]
        took_s = repeated_s(lambda: float(np.mean(work_s(rig.run({"gpu": gpu, queue: copies})[queue]))), 0.02, rig.clock)
        return max(0.0, took_s - link.packet_s - num_bytes / rate)

    rig.set_sequences([(1, KV_PAGES * PAGE)], PAGE, STREAMED_KV)
    load_s = beyond_packet_s(Op.LOAD_KV, "link_in", KV_PAGES * page_bytes, link.up_bytes_per_s, HANDOFFS)
    store_s = beyond_packet_s(Op.STORE_KV, "link_out", page_bytes / PAGE, link.down_bytes_per_s, HANDOFFS)
    rig.set_sequences([(tokens, KV_PAGES * PAGE + tokens)], PAGE, STREAMED_KV)
    beside_prompt_s = beyond_packet_s(Op.LOAD_KV, "link_in", KV_PAGES * page_bytes, link.up_bytes_per_s, PROMPT_COPIES)
    beside_prompt_s += beyond_packet_s(Op.STORE_KV, "link_out", tokens * page_bytes / PAGE, link.down_bytes_per_s, PROMPT_COPIES)
    return replace(link, load_kv_s=load_s, store_kv_s=store_s, kv_copy_token_s=max(0.0, beside_prompt_s - load_s - store_s) / (2 * tokens))


def with_contention(rig: Rig, benches: dict[Side, Bench], link: LinkProfile, effort: Effort) -> tuple[dict[Side, Slowdown], LinkProfile]:
    """Each side's slow-down while the link runs at its full rate, from memory out of the caches, in packets of the size that plans choose; and the link's
    while the CPU reads."""
    assert rig.gpu is not None
    size = max(64 << 10, min(packet_bytes(rig.gpu), rig.gpu.memory_bytes // PACKETS_PER_CARD & -4096))
    target = rig.alloc_gpu(size)
    region = benches["cpu"]
    sources = [region.weights + i * size for i in range(region.weight_bytes // size)]
    found = {}
    for side, bench in benches.items():
        rows, _ = bench.linears(bench.most_common)
        slow = {}
        for tokens in (CONTENTION_TOKENS, min(COMPUTING_TOKENS, bench.tokens)):
            rig.set_tokens(tokens)
            rows = rows[: max(len(bench.ops(bench.most_common)), len(rows) * CONTENTION_TOKENS // tokens)]
            alone_s = repeated_s(lambda rows=rows, side=side: float(work_s(rig.run({side: rows})[side]).sum()), effort.alone_s, rig.clock)  # type: ignore[misc]
            loads = _loads(rig, size, min(MOST_INSTRUCTIONS, 4 + int(3 * alone_s * link.up_bytes_per_s / size)), target, sources)
            ratios = [ratio for _ in range(effort.slowdown_runs) if (ratio := _slowdown(rig, side, rows, loads)) is not None]
            slow[tokens] = max(1.0, float(np.median(ratios))) if ratios else 1.0
        found[side] = Slowdown(slow[CONTENTION_TOKENS], slow[max(slow)])
    rig.set_tokens(CONTENTION_TOKENS)
    loads = _loads(rig, size, PACKETS_BESIDE, target, sources)
    return found, replace(link, peer_slowdown=_link_slowdown(rig, region, loads, size / link.up_bytes_per_s, effort))


def _link_slowdown(rig: Rig, cpu: Bench, loads: list[tuple[object, ...]], packet_s: float, effort: Effort) -> float:
    """How much longer packets take while the CPU reads its weights again and again."""
    rows, _ = cpu.linears(cpu.most_common)
    alone_s = repeated_s(lambda: float(work_s(rig.run({"cpu": rows})["cpu"]).sum()), effort.alone_s, rig.clock)
    rows = (rows * max(1, round(2 * len(loads) * packet_s / alone_s)))[:MOST_INSTRUCTIONS]
    ratios = [_beside(rig.run({"link_in": loads, "cpu": rows}), rig.run({"link_in": loads}), "link_in", "cpu") for _ in range(effort.slowdown_runs)]
    return max(1.0, float(np.median([ratio or 1.0 for ratio in ratios])))


def _slowdown(rig: Rig, side: Side, rows: list[tuple[object, ...]], loads: list[tuple[object, ...]]) -> float | None:
    """Time of the instructions that ran while the link was busy, against the same ones alone; None when hardly any did."""
    return _beside(rig.run({"link_in": loads, side: rows}), rig.run({side: rows}), side, "link_in")


def _beside(together: dict[RunQueue, np.ndarray], alone: dict[RunQueue, np.ndarray], side: RunQueue, other: RunQueue) -> float | None:
    trace = together[side]
    busy = (trace[:, 1] >= together[other][0, 1]) & (trace[:, 2] <= together[other][-1, 2])
    return float(work_s(trace)[busy].sum() / work_s(alone[side])[busy].sum()) if busy.mean() > 0.5 else None


def peer_slowdowns(rig: Rig, benches: dict[Side, Bench], effort: Effort) -> dict[Side, float]:
    """Each side's slow-down while the other one reads its weights, too: they may share one memory."""
    rig.set_tokens(CONTENTION_TOKENS)
    rows = {side: bench.linears(bench.most_common)[0] for side, bench in benches.items()}
    alone_s = {side: repeated_s(lambda side=side: float(work_s(rig.run({side: rows[side]})[side]).sum()), effort.alone_s, rig.clock) for side in rows}  # type: ignore[misc]
    for side, other in PEERS:  # both at work for about as long
        times = max(1, round(alone_s[other] / alone_s[side]))
        rows[side] = (rows[side] * times)[:MOST_INSTRUCTIONS]
    ratios: dict[Side, list[float]] = {"cpu": [], "gpu": []}
    for _ in range(effort.slowdown_runs):
        together = rig.run({"gpu": rows["gpu"], "cpu": rows["cpu"]})
        for side, other in PEERS:
            ratio = _beside(together, rig.run({side: rows[side]}), side, other)
            if ratio is not None:
                ratios[side].append(ratio)
    return {side: max(1.0, float(np.median(found or [1.0]))) for side, found in ratios.items()}
