"""This machine's profile: measured in a model's shapes, corrected by real passes, kept, and found again.

Owns when what is measured and stored. Knows nothing of how a rate is measured (`hardware`), of what passes teach (`rehearsal`) or of requests.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from twinpilots.errors import DeviceLostError, LimitError
from twinpilots.machine import instruction_set, open_machine, resolve_device

if TYPE_CHECKING:
    from twinpilots.hardware.profile import HardwareProfile
    from twinpilots.model.spec import ModelSpec

logger = logging.getLogger(__name__)
QUICK_S = 3.0  # what a quick measurement may take: devices' start and end included
REHEARSED_S, ALONE_S = 1.85, 2.1  # of it left to real passes: beside a GPU, and of the CPU alone
ENDING_S = 0.45  # and of that to the passes that are under way when their time is up, and to what all of them say of the profile
TYPICAL_MODEL = "dummy:smollm2-135m"  # the shapes a profile is measured in when no model is named: small enough for any GPU


def measure_machine(
    device: str, spec: ModelSpec, *, threads: int | None = None, quick: bool = False, store: bool = True, progress: Callable[[str], None] = lambda _: None
) -> HardwareProfile:
    """Measure ``device`` in the shapes of ``spec``. A stored full profile also becomes `plan`'s default for this device.

    A quick measurement is kept apart, so that it never displaces a full one, and takes `QUICK_S` at most where the box allows: each step does what it must
    once, and goes on while its share lasts. A cache that cannot be written is a warning.
    """
    until_s = time.perf_counter() + (QUICK_S if quick else math.inf)
    from twinpilots.hardware.measure import measure
    from twinpilots.hardware.store import save_profile
    from twinpilots.rehearsal import rehearse

    with open_machine(device, threads) as machine:
        left_s = ALONE_S if machine.gpu is None else REHEARSED_S
        profile = measure(machine.pilot, machine.gpu, spec, quick=quick, progress=progress, until_s=until_s - left_s)
    progress("passes of a short model: the driver, and work among its neighbours")
    try:
        profile = rehearse(machine.device, threads, spec, profile, quick=quick, until_s=until_s - ENDING_S)
    except (DeviceLostError, LimitError) as error:
        logger.warning("the profile could not be corrected by real passes, predictions will be some 20 %% too quick (%s)", error)
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
    """The stored full profile, else the stored quick one, else a quick measurement (some 3 s), which is said through ``tell``."""
    for quick in (False, True):
        found = stored_profile(device, spec, threads=threads, quick=quick)
        if found is not None:
            return found
    name, began_s = resolve_device(device), time.perf_counter()
    profile = measure_machine(device, spec, threads=threads, quick=True)
    tell(
        f"no profile of {name} for models of these widths: measured it quickly, in {time.perf_counter() - began_s:.1f} s "
        f"(`twinpilots profile MODEL --device {name}` does it thoroughly)"
    )
    return profile


def _key(device: str, spec: ModelSpec, threads: int | None, *, quick: bool) -> str:
    from twinpilots.device.cpu import choose_cores
    from twinpilots.hardware.store import profile_key

    cores = choose_cores(gpu=device != "cpu", emulated=device.startswith("emulated:")).pilot
    return profile_key(device, threads or len(cores), spec, instruction_set()) + ("-quick" if quick else "")
