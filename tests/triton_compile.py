"""Compiles the kernels for a CUDA architecture that is not here: ``python -m tests.triton_compile [sm] [case ...]``, one line per kernel.

Triton's own compiler and ptxas do the work; only the launch is left out. So a kernel that the language, the compiler or the card's shared memory refuses
is found without a card. What it computes is `tests/triton_cases.py`'s matter.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SHARED_BYTES = 99 * 1024  # of the smallest cards that we mean, sm_86 and sm_89; others have more


class AbsentDevice:
    """What the compiler asks of a driver."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only(architecture: int) -> list[str]:
    """From now on launches compile and do nothing. The list fills with the kernels' names."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(AbsentDevice(architecture))
    compiled: list[str] = []

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        def compile_it(*args: Any, **options: Any) -> None:
            began = time.monotonic()
            kernel = self.warmup(*args, grid=grid, **options)
            shared = int(kernel.metadata.shared)
            assert kernel.asm["cubin"] and shared <= SHARED_BYTES, f"{self.fn.__name__} takes {shared} bytes of shared memory"
            compiled.append(self.fn.__name__)
            seconds, code = time.monotonic() - began, len(kernel.asm["cubin"])
            sys.stdout.write(f"sm_{architecture} {self.fn.__name__}: {shared} bytes shared, {code} of code, {seconds:.1f} s\n")

        return compile_it

    JITFunction.__getitem__ = launcher
    return compiled


def main(argv: list[str]) -> None:
    compiled = compile_only(int(argv[0]) if argv else 80)
    from tests.triton_cases import CASES, PROGRAMS, drawn
    from twinpilots.runtime.machine import Machine
    from twinpilots.runtime.triton_ops import OPS, TritonOps

    for name in argv[1:] or CASES:
        both, insns, meta = drawn(CASES[name], 0)
        machine, kernels = Machine(both, torch.from_numpy(both.copy())), TritonOps(torch.device("cpu"), PROGRAMS)
        machine.begin(meta)
        for insn in insns:
            OPS[insn.op](kernels, machine, insn)  # not through `run`, which would leave what cannot be built to torch
    sys.stdout.write(f"{len(compiled)} kernels compiled\n")


if __name__ == "__main__":
    main(sys.argv[1:])
