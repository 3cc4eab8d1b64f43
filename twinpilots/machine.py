"""This machine's devices by the names that users give them, and its measured profile.

Owns the meaning of ``device`` ("auto", "cpu", "cuda:N", "emulated:PRESET") and the way from a name to opened pilots and to a stored profile.
Knows nothing of plans or requests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinpilots.errors import DeviceUnavailableError, UserError

if TYPE_CHECKING:
    from twinpilots.device.base import GpuDevice
    from twinpilots.device.cpu import CpuPilot
    from twinpilots.hardware.profile import HardwareProfile
    from twinpilots.model.spec import ModelSpec

logger = logging.getLogger(__name__)
TYPICAL_MODEL = "dummy:smollm2-135m"  # the shapes a profile is measured in when no model is named: small enough for any GPU


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


def measure_machine(
    device: str, spec: ModelSpec, *, threads: int | None = None, quick: bool = False, store: bool = True, progress: Callable[[str], None] = lambda _: None
) -> HardwareProfile:
    """Measure ``device`` in the shapes of ``spec``. A stored full profile also becomes `plan`'s default for this device.

    A quick measurement is kept apart, so that it never displaces a full one. A cache that cannot be written is a warning.
    """
    from twinpilots.hardware.measure import measure
    from twinpilots.hardware.store import save_profile

    with open_machine(device, threads) as machine:
        profile = measure(machine.pilot, machine.gpu, spec, quick=quick, progress=progress)
    if store:
        try:
            save_profile(_key(machine.device, spec, threads, quick=quick), profile, latest_for=None if quick else machine.device)
        except OSError as error:
            logger.warning("the profile could not be stored (%s); it will be measured again next time", error)
    return profile


def measure_scaled_machine(device: str, spec: ModelSpec, *, threads: int | None = None) -> HardwareProfile:
    """The nearest preset at this machine's rates, in seconds. It becomes `plan`'s default for this device unless a full profile is that already."""
    from twinpilots.hardware.measure import measure_scaled
    from twinpilots.hardware.store import save_first

    with open_machine(device, threads) as machine:
        profile = measure_scaled(machine.pilot, machine.gpu, spec)
    try:
        save_first(machine.device, profile)
    except OSError as error:
        logger.warning("the rates could not be stored (%s)", error)
    return profile


def stored_profile(device: str, spec: ModelSpec, *, threads: int | None = None, quick: bool = False) -> HardwareProfile | None:
    """What `measure_machine` stored for this device, these shapes, formats and threads; None before that."""
    from twinpilots.hardware.store import load_profile

    found = load_profile(_key(resolve_device(device), spec, threads, quick=quick))
    return None if found is None or found.missing(spec.rate_keys) else found


def load_or_measure(device: str, spec: ModelSpec, *, threads: int | None = None, tell: Callable[[str], None] = logger.warning) -> HardwareProfile:
    """The stored full profile, else the stored quick one, else a quick measurement (a few seconds), which is said through ``tell``."""
    for quick in (False, True):
        found = stored_profile(device, spec, threads=threads, quick=quick)
        if found is not None:
            return found
    name = resolve_device(device)
    profile = measure_machine(device, spec, threads=threads, quick=True)
    tell(f"no profile of {name} for models of these widths: measured it quickly (`twinpilots profile MODEL --device {name}` does it thoroughly)")
    return profile


def _key(device: str, spec: ModelSpec, threads: int | None, *, quick: bool) -> str:
    from twinpilots.device.cpu import choose_cores
    from twinpilots.hardware.store import profile_key

    cores = choose_cores(gpu=device != "cpu", emulated=device.startswith("emulated:")).pilot
    return profile_key(device, threads or len(cores), spec, instruction_set()) + ("-quick" if quick else "")


def instruction_set() -> str:
    """What the native kernels use here; "torch" where there are none."""
    from twinpilots.hardware.isa import settle_isa
    from twinpilots.kernels.native import load

    native = load()
    if native is None:
        return "torch"
    settle_isa(native)
    return native.isa_name
