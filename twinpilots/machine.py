"""This machine's devices by the names that users give them.

Owns the meaning of ``device`` ("auto", "cpu", "cuda:N", "emulated:PRESET") and the way from a name to opened pilots. Knows nothing of plans, requests or
profiles (`profiling`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinpilots.errors import DeviceUnavailableError, UserError

if TYPE_CHECKING:
    from twinpilots.device.base import GpuDevice
    from twinpilots.device.cpu import CpuPilot


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The opened pilots. ``gpu`` is None where the CPU flies alone; its memory is not allocated yet."""

    device: str
    pilot: CpuPilot
    gpu: GpuDevice | None


def resolve_device(device: str) -> str:
    """The device that a name stands for: "auto" is the first CUDA device that torch can drive, else the CPU alone. UserError for a name that is none."""
    from twinpilots.doctor import usable_cuda_device

    if device == "auto":
        return "cpu" if usable_cuda_device() is None else "cuda:0"
    if "," in device:
        raise UserError(f"device {device!r} names several GPUs, which is not supported yet; name one")
    if device == "cpu" or re.fullmatch(r"cuda:\d+|emulated:.+", device):
        return device
    if device == "cuda":
        return "cuda:0"
    raise UserError(f"unknown device {device!r}; give auto, cpu, cuda:N or emulated:PRESET")


@contextmanager
def open_machine(device: str, threads: int | None = None) -> Iterator[Machine]:
    """The pilots of ``device`` for the length of a with block; the cores are chosen by the device alone, never by a policy."""
    from twinpilots.device.cpu import CpuPilot, choose_cores

    name = resolve_device(device)
    emulated = name.startswith("emulated:")
    gpu = open_gpu(name)
    pilot = None
    try:
        pilot = CpuPilot(threads, choose_cores(gpu=gpu is not None, emulated=emulated).pilot)
        yield Machine(device=name, pilot=pilot, gpu=gpu)
    finally:
        if gpu is not None:
            gpu.close()
        if pilot is not None:
            pilot.close()


def open_gpu(device: str) -> GpuDevice | None:
    """The GPU of a resolved device name, None for "cpu". DeviceUnavailableError when it is not here or torch cannot drive it."""
    if device == "cpu":
        return None
    kind, _, which = device.partition(":")
    if kind == "emulated":
        from twinpilots.device.emulated import EmulatedGpu, emulated_preset

        return EmulatedGpu(emulated_preset(which))
    from twinpilots.doctor import cuda_devices, torch_cuda_version

    cards = cuda_devices()
    if int(which) >= len(cards):
        raise DeviceUnavailableError(f"{device} is not here: the driver shows {len(cards)} CUDA devices; use --device cpu or emulated:demo")
    if torch_cuda_version() is None:
        raise DeviceUnavailableError(f"{device} is here, but the installed torch cannot drive it; install a CUDA build of torch")
    from twinpilots.device.cuda import CudaGpu

    return CudaGpu(int(which))


def instruction_set() -> str:
    """What the native kernels use here; "torch" where there are none."""
    from twinpilots.hardware.isa import settle_isa
    from twinpilots.kernels.native import load

    native = load()
    if native is None:
        return "torch"
    settle_isa(native)
    return native.isa_name
