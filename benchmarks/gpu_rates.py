"""What the box gives: link, memory and both processors, alone and together, by routines that share nothing with our kernels and plans.

Owns those rates as one document and the profile that the hardware bound is computed with. On an emulated GPU, whose link only our queues can drive, the
profile's own figures stand in. Knows nothing of points.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twinpilots.device.cpu import choose_cores
from twinpilots.hardware.peaks import PeakMeter
from twinpilots.hardware.profile import HardwareProfile

COPY_BYTES = 256 << 20
COPIES = 8  # of it, per measurement
PEAK_SAMPLES, BESIDE_SAMPLES = 12, 40
Rates = dict[str, float]  # bytes/s and FLOP/s


def measured_rates(device: str, profile: HardwareProfile) -> Rates:
    """Alone, and with the CPU reading while the link brings weights (``_together``). ``dram``: what host memory gives to both."""
    assert profile.gpu is not None and profile.link is not None, "a GPU's rates need one"
    found = {
        "gpu_read_bytes_per_s": profile.gpu.read_bytes_per_s, "gpu_flops_per_s": profile.gpu.flops_per_s,
        "cpu_read_bytes_per_s": profile.cpu.read_bytes_per_s, "cpu_flops_per_s": profile.cpu.flops_per_s,
    }  # fmt: skip
    found |= card_rates(device) if device.startswith("cuda:") else profile_rates(profile)
    together = found["link_up_together_bytes_per_s"] + found["cpu_read_together_bytes_per_s"]
    return found | {"dram_bytes_per_s": max(profile.dram_bytes_per_s, together)}


def profile_rates(profile: HardwareProfile) -> Rates:
    """The link's rates as our own queues drive it."""
    assert profile.link is not None
    link = profile.link
    return {
        "link_up_bytes_per_s": link.up_bytes_per_s, "link_down_bytes_per_s": link.down_bytes_per_s,
        "link_up_together_bytes_per_s": link.up_bytes_per_s / link.peer_slowdown,
        "cpu_read_together_bytes_per_s": profile.cpu.read_bytes_per_s / profile.cpu.copy_slowdown,
    }  # fmt: skip


def card_rates(device: str) -> Rates:
    """A CUDA card's link by torch's own copies from and to pinned memory, alone and beside a CPU that reads with all of the pilot's cores."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    cores = choose_cores(gpu=True, emulated=False).pilot
    up = copy_rate(device, lambda: there.copy_(host, non_blocking=True))
    down = copy_rate(device, lambda: host.copy_(there, non_blocking=True))
    with PeakMeter(len(cores), cores) as meter:
        meter.sample(PEAK_SAMPLES)
        beside, read = together(device, lambda: there.copy_(host, non_blocking=True), lambda: meter.sample().read_bytes_per_s)
    return {
        "link_up_bytes_per_s": up, "link_down_bytes_per_s": down, "link_up_together_bytes_per_s": beside, "cpu_read_together_bytes_per_s": read,
    }  # fmt: skip


def copy_rate(device: str, copy: Callable[[], object]) -> float:
    """Bytes per second of copies one after another, between events on the device: the best of some runs."""
    import torch

    best = 0.0
    with torch.cuda.device(device):
        for _ in range(3):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(COPIES):
                copy()
            ended.record()
            ended.synchronize()
            best = max(best, COPIES * COPY_BYTES / (1e-3 * began.elapsed_time(ended)))
    return best


def together(device: str, copy: Callable[[], object], read: Callable[[], float]) -> tuple[float, float]:
    """(link, CPU read) bytes per second while both are at work: the means of copies and the median of samples between which no copy was missing."""
    import torch

    stop, rates = threading.Event(), list[float]()

    def keep_copying() -> None:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            while not stop.is_set():
                rates.append(copy_rate_once(copy))

    thread = threading.Thread(target=keep_copying)
    thread.start()
    try:
        while not rates and thread.is_alive():
            read()
        first = len(rates)
        samples = [read() for _ in range(BESIDE_SAMPLES)]
        last = len(rates)
    finally:
        stop.set()
        thread.join()
    return statistics.mean(rates[first : max(last, first + 1)] or [0.0]), statistics.median(samples)


def copy_rate_once(copy: Callable[[], object]) -> float:
    """One copy behind another, on the present stream; the second is timed, so that the link is never without work."""
    import torch

    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    copy()
    began.record()
    copy()
    ended.record()
    ended.synchronize()
    return COPY_BYTES / (1e-3 * began.elapsed_time(ended))


def bound_profile(profile: HardwareProfile, rates: Rates) -> HardwareProfile:
    """The profile with these rates, where they are higher than its own: nothing may beat the hardware bound."""
    assert profile.gpu is not None and profile.link is not None
    link = replace(
        profile.link, up_bytes_per_s=max(profile.link.up_bytes_per_s, rates["link_up_bytes_per_s"]),
        down_bytes_per_s=max(profile.link.down_bytes_per_s, rates["link_down_bytes_per_s"]),
    )  # fmt: skip
    return replace(profile, link=link, dram_bytes_per_s=rates["dram_bytes_per_s"])


def rates_text(rates: dict[str, Any]) -> str:
    return ", ".join(f"{name.removesuffix('_per_s').replace('_', ' ')} {value / 1e9:.3g} G/s" for name, value in rates.items())
