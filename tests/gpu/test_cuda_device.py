"""The CUDA device on a real GPU: what the stand-in (tests/cpu/test_cuda_standin.py) cannot show."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.cpu.native_twin import Machine
from tests.device_programs import entry, insn, load, weights
from tests.graph_case import PLAN_SEEDS, Eager, compare
from tests.programs import ARENA, Program, add, attention, embed, linear, linear_in, norm
from tests.words_case import Polling, hand_offs
from twinpilots.device.cuda import CudaGpu, CudaRuntime
from twinpilots.device.cuda_words import device_pointer, load_driver
from twinpilots.device.memory import HostArena
from twinpilots.errors import DeviceLostError, LimitError
from twinpilots.kernels.abi import EVENTS_OFFSET, Op, Space, address
from twinpilots.kernels.triton import unavailable
from twinpilots.runtime.machine import OFFSET_MASK, decode
from twinpilots.runtime.machine import Machine as TorchMachine
from twinpilots.runtime.torch_ops import execute, multiply

pytestmark = pytest.mark.gpu
MIB = 2**20
DEVICE = "cuda:0"


@pytest.fixture
def device() -> Iterator[tuple[HostArena, CudaGpu]]:
    host, gpu = HostArena(128 * MIB, num_events=64), CudaGpu(0)
    gpu.open(host, 128 * MIB)
    yield host, gpu
    gpu.close()
    host.close()


def test_packets_arrive_and_events_cross_between_streams_and_host(device: tuple[HostArena, CudaGpu]) -> None:
    host, gpu = device
    src, data = weights(host, 8 * MIB)
    for number in range(1, 20):
        gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 100, waits=(2,), record=3), pass_id=number))
        gpu.submit("link_in", entry(host, load(host, [(0, src, 8 * MIB)], record=2), pass_id=number))
        gpu.wait("gpu", 10.0)
        assert host.events[2] == number and host.events[3] == number
        got = gpu.read(0, 8 * MIB)
        assert (got[:100] == 0xFF).all() and np.array_equal(got[100:], data[100:])


def test_the_host_arena_is_pinned_and_mapped(device: tuple[HostArena, CudaGpu]) -> None:
    host, gpu = device
    assert device_pointer(load_driver(), host.base) is not None
    src, _ = weights(host, 64 * MIB)
    program = entry(host, *[load(host, [(0, src, 64 * MIB)])] * 8)
    gpu.submit("link_in", program)
    gpu.wait("link_in", 10.0)
    began = time.perf_counter()
    gpu.submit("link_in", program)
    gpu.wait("link_in", 10.0)
    rate = 8 * 64 * MIB / (time.perf_counter() - began)
    assert rate > 5e9, f"{rate / 1e9:.1f} GB/s: pageable memory would be this slow"


def test_memory_beyond_the_card_is_refused() -> None:
    host, gpu = HostArena(MIB, num_events=4), CudaGpu(0)
    with pytest.raises(LimitError, match="lower --gpu-memory"):
        gpu.open(host, gpu.memory_bytes + 1)
    host.close()


def test_the_whole_footprint_is_arena_and_overhead() -> None:
    free_before, _ = torch.cuda.mem_get_info(0)
    host, gpu = HostArena(MIB, num_events=4), CudaGpu(0)
    gpu.open(host, 64 * MIB)
    free_after, _ = torch.cuda.mem_get_info(0)
    assert free_before - free_after <= 64 * MIB + gpu.overhead_bytes
    gpu.close()
    host.close()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_products_keep_fp32_sums_and_survive_large_activations(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(7, 300) * torch.tensor([1.0, 1e-3, 1e5, 1, 1, 1, 1])[:, None], torch.randn(3, 300, 40).to(dtype)
    found, wanted = multiply(x.cuda(), w.cuda()).cpu().double(), torch.matmul(x.double(), w.double())
    error = (found - wanted).square().mean(-1).sqrt() / wanted.square().mean(-1).sqrt()
    assert found.dtype == torch.float64 and error.max() < tolerance


def moved(value: int, space: Space) -> int:
    """Where an address of a test machine lies once both of its arenas are one, the GPU's behind the host's; other arguments stay as they are."""
    if value >> 56 == Space.GPU:
        return address(space, ARENA + (value & OFFSET_MASK))
    return address(space, value) if value >= EVENTS_OFFSET else value


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("program", [embed, norm, linear, linear_in, attention, add], ids=lambda case: case.__name__)
def test_instructions_on_the_gpu_agree_with_the_cpu(program: Program, seed: int) -> None:
    machine = Machine(ARENA)
    insns, batch = program(np.random.default_rng(seed), machine)
    meta = machine.put(batch.words)
    before = np.concatenate([machine.host, machine.gpu])
    after = before.copy()
    on_cpu, on_gpu = TorchMachine(after, None), TorchMachine(before, torch.from_numpy(before).to(DEVICE))
    for decoded in decode(np.stack(insns)):
        for target, space in ((on_cpu, Space.HOST), (on_gpu, Space.GPU)):
            target.begin(meta)
            execute(target, decoded._replace(a=[moved(value, space) for value in decoded.a]))
    found = on_gpu.bytes_at(address(Space.GPU, 0), 2 * ARENA).cpu().numpy()
    changed = after.view(np.uint32) != before.view(np.uint32)
    np.testing.assert_allclose(found.view(np.float32)[changed], after.view(np.float32)[changed], rtol=3e-2, atol=6e-2)
    assert np.array_equal(found.view(np.uint32)[~changed], before.view(np.uint32)[~changed])


@pytest.mark.parametrize("plan_seed", PLAN_SEEDS)
def test_replayed_launches_give_the_same_bits(plan_seed: int) -> None:
    if unavailable(torch.device(DEVICE)) is not None:
        pytest.skip("no Triton kernels here: nothing is captured")
    compare(CudaGpu(0, Eager(0)), CudaGpu(0), plan_seed)


@pytest.mark.parametrize("polling", [False, True])
def test_data_comes_before_the_word_that_says_so(polling: bool) -> None:
    gpu = CudaGpu(0, Polling(0) if polling else None)
    hand_offs(gpu, 25)
    assert gpu.device_waits.startswith("no: ") or not polling


@pytest.fixture
def waiting(device: tuple[HostArena, CudaGpu]) -> tuple[HostArena, CudaGpu]:
    """A device whose stream waits for a word that nobody has written, and whose launch thread has gone on."""
    host, gpu = device
    if gpu.device_waits != "yes":
        pytest.skip(gpu.device_waits)
    gpu.submit("gpu", entry(host, insn(Op.POISON, address(Space.GPU, 0), 100, waits=(20,), record=21)))
    gpu.submit("link_out", entry(host, insn(Op.POISON, address(Space.GPU, 1000), 100, waits=(21,))))
    deadline = time.monotonic() + 10.0
    while gpu.launches["waits_on_device"] == 0:
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    time.sleep(0.1)
    assert host.events[21] == 0, "the stream did not wait"
    return host, gpu


def test_a_stream_goes_on_when_the_cpu_writes_its_word(waiting: tuple[HostArena, CudaGpu]) -> None:
    host, gpu = waiting
    host.events[20] = 1
    gpu.wait("gpu", 10.0)
    gpu.wait("link_out", 10.0)
    assert host.events[21] == 1 and (gpu.read(0, 100) == 0xFF).all() and (gpu.read(1000, 100) == 0xFF).all()


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_a_stream_whose_word_never_comes_is_let_go(waiting: tuple[HostArena, CudaGpu], how: str) -> None:
    host, gpu = waiting
    began = time.monotonic()
    if how == "close":
        gpu.close()
    elif how == "cancel":
        gpu.cancel("gpu", 1)
        gpu.wait("link_out", 10.0)
    else:
        host.set_abort()
        with pytest.raises(DeviceLostError, match="aborted"):
            gpu.wait("gpu", 10.0)
        gpu.close()
    assert time.monotonic() - began < 5.0


def test_launches_stop_before_the_devices_own_queue_is_full(device: tuple[HostArena, CudaGpu]) -> None:
    """A launch thread that is stuck in a launch would not see the cancel."""
    host, gpu = device
    if gpu.device_waits != "yes":
        pytest.skip(gpu.device_waits)
    fills = [insn(Op.POISON, address(Space.GPU, 0), 100, record=22) for _ in range(3000)]
    program = entry(host, insn(Op.POISON, address(Space.GPU, 0), 100, waits=(20,)), *fills)
    program["trace"] = host.alloc(24 * 3001, "programs")
    gpu.submit("gpu", program)
    time.sleep(1.0)
    launched = gpu.launches["launched"]
    time.sleep(0.2)
    assert 0 < launched == gpu.launches["launched"] < 100
    began = time.monotonic()
    gpu.cancel("gpu", 1)
    assert time.monotonic() - began < 5.0


def test_memory_that_somebody_else_has_pinned_is_used_and_stays_theirs() -> None:
    host, keeper = HostArena(64 * MIB, num_events=64), CudaRuntime(0)
    keeper.pin(host)
    for _ in range(2):  # engines that follow one another over the same arena
        host.renew(None)
        gpu = CudaGpu(0)
        gpu.open(host, 16 * MIB)
        src, data = weights(host, 4 * MIB)
        gpu.submit("link_in", entry(host, load(host, [(0, src, 4 * MIB)], record=2)))
        gpu.wait("link_in", 10.0)
        assert np.array_equal(gpu.read(0, 4 * MIB), data)
        gpu.close()
    assert device_pointer(load_driver(), host.base) is not None, "still pinned"
    keeper.release(host)
    host.close()
