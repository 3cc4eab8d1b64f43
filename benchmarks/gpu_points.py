"""The points of `make gpu-bench`: which model under which memory cap with how many sequences at which context; and how they are dealt to slices.

Owns `Point`, the two lists and the slicing. Pure data: knows nothing of devices or of how a point is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twinpilots.commands.models import model_spec
from twinpilots.config import Quantization
from twinpilots.errors import UserError
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.workload import Workload

GIB, MIB = 1 << 30, 1 << 20
STEPS = 64  # tokens that a decode point's sequences may still generate: its warm-up and timed passes
Kind = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """``num_seqs`` sequences that decode after ``context`` tokens, or whose prompts of ``context`` tokens are read. ``gpu_memory`` caps the process's whole
    footprint (bytes). ``against_peers``: other engines run it, too."""

    model: str
    quantization: Quantization | None
    kind: Kind
    gpu_memory: int
    num_seqs: int
    context: int
    against_peers: bool = False

    @property
    def name(self) -> str:
        cap = f"{self.gpu_memory // GIB}GiB" if self.gpu_memory % GIB == 0 else f"{self.gpu_memory // MIB}MiB"
        return f"{self.kind} {self.model}{f' {self.quantization}' if self.quantization else ''} {cap} x{self.num_seqs} @{self.context}"

    @property
    def family(self) -> tuple[str, Quantization | None]:
        """Points of one family are measured over the same weights in host memory."""
        return self.model, self.quantization

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model, quantization=self.quantization)

    @property
    def workload(self) -> Workload:
        """What is planned for. Decode: half of the tokens are generated, so that decoding decides; nobody grows beyond the timed passes."""
        prompt, output = (self.context, 1) if self.kind == "prefill" else (self.context - self.context // 2, self.context // 2 + STEPS)
        return Workload(num_requests=self.num_seqs, input_len=prompt, output_len=output, max_num_seqs=self.num_seqs)


def _points(
    model: str, quantization: Quantization | None, unit: int, rows: Sequence[tuple[Kind, int, int, int]], peers: Sequence[int] = ()
) -> tuple[Point, ...]:
    """``rows``: (kind, cap in ``unit``, sequences, context); ``peers``: numbers of the rows that others run, too."""
    return tuple(
        Point(model=model, quantization=quantization, kind=kind, gpu_memory=cap * unit, num_seqs=num_seqs, context=context, against_peers=number in peers)
        for number, (kind, cap, num_seqs, context) in enumerate(rows)
    )


# Contexts are chosen so that weights and KV of all sequences fit in 128 GiB of host memory, of which the box must keep some. Inside a model: the
# most telling first, for what time does not allow is left out from the end.
CARD_POINTS = (
    *_points("dummy:llama-3-8b", None, GIB, (
        ("decode", 8, 1, 2048), ("decode", 8, 8, 2048), ("decode", 8, 32, 2048), ("prefill", 8, 1, 4096), ("decode", 16, 128, 1024), ("decode", 24, 16, 2048),
        ("prefill", 8, 8, 4096), ("decode", 8, 4, 2048),
    ), peers=(0, 1, 2, 3)),
    *_points("dummy:opt-30b", None, GIB, (
        ("decode", 24, 1, 1024), ("decode", 16, 16, 1024), ("prefill", 16, 4, 1920), ("decode", 8, 4, 1024), ("decode", 24, 64, 256),
    )),
    *_points("dummy:qwen2.5-32b", None, GIB, (
        ("decode", 16, 1, 2048), ("decode", 24, 8, 2048), ("prefill", 24, 2, 4096), ("decode", 16, 64, 2048), ("decode", 24, 256, 512), ("decode", 8, 2, 2048),
    )),
    *_points("dummy:llama-3-70b", "int4", GIB, (
        ("decode", 24, 1, 2048), ("decode", 16, 8, 2048), ("prefill", 24, 1, 4096), ("decode", 24, 128, 512), ("decode", 8, 4, 2048),
    )),
)  # fmt: skip
EMULATED_POINTS = (
    *_points("dummy:smollm2-135m", None, MIB, (("decode", 24, 2, 128), ("prefill", 24, 2, 192), ("decode", 28, 4, 64))),
    *_points("dummy:smollm2-135m", "int4", MIB, (("decode", 24, 2, 128),)),
)  # fmt: skip


def points_for(device: str) -> tuple[Point, ...]:
    """What is measured on a device, all slices together."""
    return EMULATED_POINTS if device.startswith("emulated:") else CARD_POINTS


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Part ``number`` (from 1) of ``count`` alike ones."""

    number: int
    count: int

    @staticmethod
    def of(text: str) -> Slice:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"slice {text!r} must be i/n with 1 <= i <= n, as in 2/3")
        return Slice(number=int(found[1]), count=int(found[2]))

    def take(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """A run of neighbours, so that few models are loaded; all slices together are all points, each once."""
        first, last = ((len(points) * edge) // self.count for edge in (self.number - 1, self.number))
        return tuple(points[first:last])


def by_family(points: Sequence[Point]) -> list[list[Point]]:
    """Neighbours of one family together, in their order."""
    found: dict[tuple[str, Quantization | None], list[Point]] = {}
    for point in points:
        found.setdefault(point.family, []).append(point)
    return list(found.values())
