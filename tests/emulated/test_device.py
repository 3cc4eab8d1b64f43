"""The emulated GPU keeps its promises: real copies at the preset's rate, its own memory limit, and a death that everybody hears of at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.device_programs import entry, insn, load, weights
from twinpilots.device.base import QUEUE_NAMES
from twinpilots.device.cpu import CpuPilot
from twinpilots.device.emulated import EMULATED, EmulatedGpu, EmulatedPreset, emulated_preset
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError, DeviceUnavailableError, LimitError
from twinpilots.kernels import native
from twinpilots.kernels.abi import Op, Space, address

MIB = 2**20
DEMO = EMULATED["demo"]
FREE = EmulatedPreset(name="free", memory_bytes=16 * MIB, up_bytes_per_s=0, down_bytes_per_s=0, latency_s=0)


@contextmanager
def opened(preset: EmulatedPreset = FREE, num_bytes: int = 2 * MIB, host_bytes: int = 8 * MIB, **options: Any) -> Iterator[tuple[HostArena, EmulatedGpu]]:
    host, gpu = HostArena(host_bytes, num_events=64), EmulatedGpu(preset, **options)
    try:
        gpu.open(host, num_bytes)
        yield host, gpu
    finally:
        gpu.close()
        host.close()


def test_a_packet_arrives_whole_where_its_segments_say() -> None:
    with opened() as (host, gpu):
        src, data = weights(host, 3000)
        gpu.submit("link_in", entry(host, load(host, [(4096, src, 1000), (100, src + 1000, 2000)], record=5)))
        gpu.wait("link_in", 10.0)
        assert np.array_equal(gpu.read(4096, 1000), data[:1000]) and np.array_equal(gpu.read(100, 2000), data[1000:])
        assert host.events[5] == 1, "the queue records the pass id"


def test_written_memory_reads_back_and_fresh_memory_is_zero() -> None:
    with opened() as (_, gpu):
        data = np.random.default_rng(1).standard_normal((300, 700)).astype(np.float32)
        assert not gpu.read(0, 2 * MIB).any()
        gpu.write(1024, data)
        assert np.array_equal(gpu.read(1024, data.nbytes).view(np.float32), data.ravel())
        with pytest.raises(ValueError, match="leave the GPU arena"):
            gpu.write(2 * MIB - 1, np.zeros(2, np.uint8))


def test_the_adversary_fills_fresh_memory_with_nan() -> None:
    with opened(adversarial_seed=3) as (_, gpu):
        assert np.isnan(gpu.read(0, 4096).view(np.float32)).all()


def test_queues_wait_for_each_others_events() -> None:
    with opened() as (host, gpu):
        src, data = weights(host, 1 * MIB)
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 512, waits=(9,)), insn(Op.POISON, address(Space.GPU, 512), 8, record=11)))
        time.sleep(0.05)
        assert host.events[11] == 0, "nobody has recorded event 9 yet"
        gpu.submit("link_in", entry(host, load(host, [(0, src, MIB)], record=9)))
        gpu.wait("gpu", 10.0)
        got = gpu.read(0, MIB)
        assert (got[:520] == 0xFF).all() and np.array_equal(got[520:], data[520:]), "the poison came after the load"


def test_more_than_the_presets_memory_is_refused_before_anything_starts() -> None:
    with pytest.raises(LimitError, match=r"emulated:demo has 32 MiB of memory, 33 MiB asked for; lower --gpu-memory"), opened(DEMO, 33 * MIB):
        pass


def test_a_busy_link_runs_at_its_rate() -> None:
    with opened(DEMO, 10 * MIB, 64 * MIB) as (host, gpu):
        src, _ = weights(host, 10 * MIB)
        total, best = 50_000_000, 0.0
        one = load(host, [(0, src, 10_000_000)])
        for attempt in range(12):  # other people's load only ever slows it down
            began = time.perf_counter()
            gpu.submit("link_in", entry(host, *[one] * (total // 10_000_000), pass_id=attempt + 1))
            gpu.wait("link_in", 10.0)
            best = max(best, total / (time.perf_counter() - began) / DEMO.up_bytes_per_s)
            if best >= 0.9:
                break
        assert 0.9 <= best <= 1.02


def test_the_link_can_change_its_rate_while_its_queue_runs() -> None:
    with opened(DEMO, 10 * MIB, 64 * MIB) as (host, gpu):
        src, _ = weights(host, 10 * MIB)
        one = load(host, [(0, src, 10_000_000)])

        def best_s(first_pass: int) -> float:
            taken = []
            for attempt in range(3):
                began = time.perf_counter()
                gpu.submit("link_in", entry(host, one, pass_id=first_pass + attempt))
                gpu.wait("link_in", 10.0)
                taken.append(time.perf_counter() - began)
            return min(taken)

        gpu.set_link_rates(up_bytes_per_s=1e8, down_bytes_per_s=1e8)
        assert best_s(1) >= 0.1
        gpu.set_link_rates(up_bytes_per_s=DEMO.up_bytes_per_s, down_bytes_per_s=DEMO.down_bytes_per_s)
        assert best_s(4) < 0.05
        with pytest.raises(ValueError, match="up_bytes_per_s must be a number of at least 0, got -1"):
            gpu.set_link_rates(up_bytes_per_s=-1, down_bytes_per_s=0)


def test_cancel_drops_what_waits_and_leaves_later_passes_alone() -> None:
    with opened() as (host, gpu):
        for number in (1, 2):
            gpu.submit("link_in", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(20,)), pass_id=number))
        gpu.cancel("link_in", 2)
        gpu.submit("link_in", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, record=21), pass_id=3))
        gpu.wait("link_in", 5.0)
        assert host.events[21] == 3 and host.events[20] == 0


def test_a_killed_device_is_noticed_at_once_by_every_pilot() -> None:
    with opened() as (host, gpu):
        never = insn(Op.POISON, address(Space.GPU, 0), 4, waits=(30,))
        gpu.submit("gpu", entry(host, never))
        assert gpu.pid is not None
        began = time.monotonic()
        os.kill(gpu.pid, signal.SIGKILL)
        with pytest.raises(DeviceLostError, match="emulated:free was killed by SIGKILL"):
            gpu.wait("gpu", 60.0)
        scratch = host.alloc(64, "workspace")
        pilot = CpuPilot(threads=1)
        with pytest.raises(DeviceLostError, match="aborted"):
            pilot.run(entry(host, insn(Op.POISON, scratch, 64, waits=(30,))), host)
        pilot.close()
        with pytest.raises(DeviceLostError, match="SIGKILL"):
            gpu.read(0, 4)
        assert time.monotonic() - began < 10.0


def test_a_wait_that_takes_too_long_is_a_lost_device() -> None:
    with opened() as (host, gpu):
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(30,))))
        with pytest.raises(DeviceLostError, match=r"did not finish within 0\.2 s"):
            gpu.wait("gpu", 0.2)


def test_a_bad_instruction_is_a_lost_device_with_the_reason() -> None:
    with opened() as (host, gpu):
        broken = insn(Op.POISON, address(Space.GPU, 0), 4)
        broken["op"] = 99
        gpu.submit("gpu", entry(host, broken))
        with pytest.raises(DeviceLostError, match="instruction"):
            gpu.wait("gpu", 5.0)


def test_the_queue_has_room_for_sixty_four_entries() -> None:
    with opened() as (host, gpu):
        one = entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(30,)))
        with pytest.raises(RuntimeError, match="64 unfinished entries"):
            for _ in range(70):
                gpu.submit("gpu", one)


def test_two_devices_live_side_by_side() -> None:
    with opened() as (host_a, gpu_a), opened() as (host_b, gpu_b):
        for seed, host, gpu in ((1, host_a, gpu_a), (2, host_b, gpu_b)):
            src, _ = weights(host, 4096, seed)
            gpu.submit("link_in", entry(host, load(host, [(0, src, 4096)])))
        for gpu in (gpu_a, gpu_b):
            gpu.wait("link_in", 5.0)
        assert not np.array_equal(gpu_a.read(0, 4096), gpu_b.read(0, 4096))
        assert gpu_a.pid is not None
        os.kill(gpu_a.pid, signal.SIGKILL)
        with pytest.raises(DeviceLostError):
            gpu_a.read(0, 4)
        gpu_b.wait("gpu", 1.0)
        assert host_a.aborted and not host_b.aborted


def test_closing_leaves_neither_process_nor_file_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with opened() as (_, gpu):
        pid = gpu.pid
        assert pid is not None and Path(f"/proc/{pid}").exists()
    gpu.close()  # again
    assert not Path(f"/proc/{pid}").exists()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_device_dies_with_its_driver(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal
        from twinpilots.device.emulated import EMULATED, EmulatedGpu
        from twinpilots.device.memory import HostArena
        gpu = EmulatedGpu(EMULATED["demo"])
        gpu.open(HostArena(2**20, num_events=4), 2**20)
        print(gpu.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    driver = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    pid, deadline = int(driver.stdout), time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]:
        time.sleep(0.01)
    assert time.monotonic() < deadline


@pytest.mark.skipif(native.load() is None, reason="without the native module the worker needs torch")
def test_the_device_is_up_quickly_on_one_core_and_without_torch() -> None:
    with opened() as (_, gpu):
        maps = Path(f"/proc/{gpu.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert {os.sched_getaffinity(int(task)) == {gpu.core} for task in os.listdir(f"/proc/{gpu.pid}/task")} == {True}
        assert len(os.listdir(f"/proc/{gpu.pid}/task")) == 1 + len(QUEUE_NAMES)


def test_presets_come_by_name_or_file_and_others_point_to_the_planner(tmp_path: Path) -> None:
    assert emulated_preset("demo") is DEMO
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"memory_bytes": 1000, "up_bytes_per_s": 1e9, "down_bytes_per_s": 2e9, "latency_s": 0}))
    assert emulated_preset(str(file)) == EmulatedPreset(name="mine", memory_bytes=1000, up_bytes_per_s=1e9, down_bytes_per_s=2e9, latency_s=0)
    with pytest.raises(DeviceUnavailableError, match="twinpilots plan MODEL --hardware rtx-4090"):
        emulated_preset("rtx-4090")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"memory_bytes": -1, "up_bytes_per_s": 1, "down_bytes_per_s": 1, "latency_s": 0}',
             '{"memory_bytes": 9, "up_bytes_per_s": 1, "down_bytes_per_s": 1, "latency_s": 0, "color": "red"}',
             '{"memory_bytes": 9, "up_bytes_per_s": NaN, "down_bytes_per_s": 1, "latency_s": 0}'],
)  # fmt: skip
def test_a_malformed_preset_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(DeviceUnavailableError, match=r"bad\.json"):
        emulated_preset(str(file))


def test_without_the_native_module_the_worker_runs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpilots.device.emulated.native_module.load", lambda: None)
    with opened(EmulatedPreset(name="slow", memory_bytes=MIB, up_bytes_per_s=1e8, down_bytes_per_s=1e8, latency_s=0), MIB, adversarial_seed=2) as (host, gpu):
        src, data = weights(host, 10_000)
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 512, waits=(9,), record=10)))
        gpu.submit("link_in", entry(host, load(host, [(0, src, 10_000)], record=9)))
        gpu.wait("link_in", 30.0)
        gpu.wait("gpu", 30.0)
        got = gpu.read(0, 10_000)
        assert (got[:512] == 0xFF).all() and np.array_equal(got[512:], data[512:]) and host.events[10] == 1
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(20,)), pass_id=2))
        gpu.cancel("gpu", 2)
        assert gpu.pid is not None
        os.kill(gpu.pid, signal.SIGKILL)
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 4, waits=(20,)), pass_id=3))
        with pytest.raises(DeviceLostError, match="SIGKILL"):
            gpu.wait("gpu", 5.0)


def test_misuse_is_refused() -> None:
    private = HostArena(MIB, shared=False, num_events=4)
    gpu = EmulatedGpu(FREE)
    with pytest.raises(ValueError, match="shared"):
        gpu.open(private, MIB)
    with pytest.raises(ValueError, match="not open"):
        gpu.wait("gpu", 1.0)
    private.close()
