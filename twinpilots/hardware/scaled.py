"""A machine of which little is known: the preset that is most like it, scaled to a few measured rates.

Owns `Anchors` (those rates) and the scaling. Pure: `measure.py` measures them. Knows nothing of models or plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from twinpilots.hardware.presets import PRESETS
from twinpilots.hardware.profile import ComputeProfile, Curve, HardwareProfile


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Per second: bytes that each processor reads, multiply-adds' FLOPs, bytes over the link each way. None without a GPU."""

    cpu_read: float
    cpu_flops: float
    gpu_read: float | None = None
    gpu_flops: float | None = None
    up: float | None = None
    down: float | None = None

    @staticmethod
    def of(profile: HardwareProfile) -> Anchors:
        """What a profile says of them."""
        gpu, link = profile.gpu, profile.link
        return Anchors(
            cpu_read=profile.cpu.read_bytes_per_s, cpu_flops=profile.cpu.flops_per_s, gpu_read=gpu.read_bytes_per_s if gpu else None,
            gpu_flops=gpu.flops_per_s if gpu else None, up=link.up_bytes_per_s if link else None, down=link.down_bytes_per_s if link else None,
        )  # fmt: skip

    def distance(self, other: Anchors) -> float:
        """Mean difference of the rates that both have, in doublings."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__]
        known = [abs(math.log2(a / b)) for a, b in pairs if a is not None and b is not None]
        return sum(known) / len(known)


def nearest(anchors: Anchors, presets: Iterable[HardwareProfile] = PRESETS.values()) -> HardwareProfile:
    """The preset whose rates are most like these."""
    return min(presets, key=lambda preset: anchors.distance(Anchors.of(preset)))


def scaled(anchors: Anchors, preset: HardwareProfile | None = None) -> HardwareProfile:
    """The nearest preset (or the given one) at these rates: all kinds of linears, so that every model can be planned. Fixed costs stay the preset's."""
    preset = preset or nearest(anchors)
    source = f"the preset {preset.name} scaled to a few measured rates, not a profile: `twinpilots profile MODEL` is more exact"
    cpu = _at(preset.cpu, anchors.cpu_read, anchors.cpu_flops)
    made = replace(preset, source=source, cpu=cpu, notes={"scaled from": preset.name})
    if anchors.gpu_read is None or anchors.gpu_flops is None or anchors.up is None or anchors.down is None:
        return replace(made, gpu=None, link=None, gpu_memory_bytes=0, emulated=False)
    assert preset.gpu is not None and preset.link is not None, "presets have a GPU"
    link = replace(preset.link, up_bytes_per_s=anchors.up, down_bytes_per_s=anchors.down)
    return replace(made, gpu=_at(preset.gpu, anchors.gpu_read, anchors.gpu_flops), link=link)


def filled(profile: HardwareProfile) -> HardwareProfile:
    """A measured profile with the kinds of linears that were not measured taken from the nearest preset at the profile's own rates."""
    return profile.with_curves_of(scaled(Anchors.of(profile)))


def _at(processor: ComputeProfile, read: float, flops: float) -> ComputeProfile:
    """Reading and computing scaled apart: which of them takes the time at a token count may change."""
    slower_read, slower_flops = processor.read_bytes_per_s / read, processor.flops_per_s / flops

    def at(curve: Curve) -> Curve:
        per_token = curve.y[-1] / curve.x[-1]  # a sheet's last point computes
        return Curve(x=curve.x, y=tuple(max(curve.y[0] * slower_read, per_token * x * slower_flops) for x in curve.x))

    return replace(
        processor, linear={key: at(curve) for key, curve in processor.linear.items()}, attention_bytes_per_s=processor.attention_bytes_per_s / slower_read,
        attention_flops_per_s=processor.attention_flops_per_s / slower_flops, elementwise_bytes_per_s=processor.elementwise_bytes_per_s / slower_read,
        read_bytes_per_s=read, flops_per_s=flops,
    )  # fmt: skip
