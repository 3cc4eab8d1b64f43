"""GPU kernels in Triton, and the one place that chooses between them and torch's operations.

Owns the rules: whether this machine can use them at all, which products they take, and which errors mean "this kernel cannot be built here", after which
torch's slower operations take over. Importing this module imports neither torch nor triton; its siblings need both.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from typing import Any

from twinpilots.model.weight_format import WeightFormat

OLDEST = (3, 4)
FEW_ROWS = 64
_BUILD_FAILURES = ("PassManager::run failed", "C compiler")  # RuntimeErrors of the compiler; others are CUDA's, and fatal


def unavailable(device: Any) -> str | None:
    """Why a torch device runs without these kernels; None when it can have them."""
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return None


def multiplies(fmt: WeightFormat, rows: int) -> bool:
    """Whether these kernels multiply ``rows`` rows. torch would first unpack quantised weights; of others it is as fast where there are many rows."""
    return fmt.is_quantized or rows <= FEW_ROWS


def cannot_build(error: Exception) -> bool:
    """Whether ``error`` says that a kernel could not be compiled for this device: nothing was launched."""
    from triton.errors import TritonError

    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _BUILD_FAILURES)
    return isinstance(error, TritonError | subprocess.CalledProcessError | FileNotFoundError)
