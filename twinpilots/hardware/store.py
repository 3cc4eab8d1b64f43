"""Keeps measured profiles in the user's cache directory, keyed by hardware, versions and what they were measured for.

Owns the file names and their key, also of what hardware/isa.py notes. Knows nothing of how a profile is measured or used.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path

from twinpilots.errors import ProfileMissingError
from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec

SCALED = "scaled from"  # the note of a profile that was not measured
STORE_VERSION = 10  # raise it when the kernels' speed or the experiments change, so that old profiles are measured again


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/twinpilots``, by default ``~/.cache/twinpilots``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinpilots"


def profile_key(device: str, threads: int, spec: ModelSpec, isa: str) -> str:
    """What a profile depends on: processor, device, threads, instruction set, the native dtype (attention's), and the model's widths. Weight formats are
    not part of it: one profile holds the curves of all that were measured."""
    widths = (spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim)
    family = _digest((STORE_VERSION, _processor_name(), os.cpu_count(), device, threads, isa, spec.weight_dtype))
    return f"{family}-{_digest(widths)}"


def _digest(parts: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def profile_path(key: str) -> Path:
    return cache_dir() / "profiles" / f"{key}.json"


def save_profile(key: str, profile: HardwareProfile, *, latest_for: str | None = None) -> Path:
    """Writes the profile atomically, together with what was measured earlier for other weight formats; ``latest_for`` (a device name) makes it `plan`'s
    default, too. OSError when the cache cannot be written."""
    path = profile_path(key)
    earlier = load_profile(key)
    if earlier is not None:
        profile = profile.with_curves_of(earlier)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target in [path] + ([_latest_path(latest_for)] if latest_for else []):
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(profile.to_json())
        os.replace(file.name, target)
    return path


def save_first(device: str, profile: HardwareProfile) -> None:
    """Makes a scaled preset `plan`'s default for a device, as long as there is no measured profile. OSError when the cache cannot be written."""
    path = _latest_path(device)
    found = _read(path)
    if found is None or SCALED in found.notes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.to_json())


def load_profile(key: str) -> HardwareProfile | None:
    """The stored profile of this key, or None; a damaged file counts as none (it will be measured and written again)."""
    return _read(profile_path(key))


def latest_profile(device: str) -> HardwareProfile:
    """This machine's most recent full profile for a device. Raises ProfileMissingError with the command that makes one."""
    found = _read(_latest_path(device))
    if found is None:
        raise ProfileMissingError(
            f"this machine has no stored profile for device {device}: run `twinpilots profile --device {device}`, or name a preset with --hardware"
        )
    return found


def isa_path() -> Path:
    """Where the instruction set of this processor's kernels is noted (hardware/isa.py)."""
    return cache_dir() / "isa" / f"{_digest((STORE_VERSION, _processor_name(), os.cpu_count()))}.json"


def _latest_path(device: str) -> Path:
    safe = "".join(c if c.isalnum() else "-" for c in device)
    return cache_dir() / "profiles" / f"latest-{safe}.json"


def _read(path: Path) -> HardwareProfile | None:
    try:
        return HardwareProfile.from_json(path.read_text())
    except (OSError, ValueError):
        return None


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
