"""The Triton kernels compile for real cards on a machine that has none: Triton's compiler and ptxas run, only the launch is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: no Triton kernel is compiled here (pip install -e '.[dev]' on Linux)", exc_type=ImportError)
CASES = ("norm", "add", "copy", "append bf16", "attention 16-bit", "linear q4_1")  # one of each kernel; all cases: python -m tests.triton_compile


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_compiles_and_fits_the_smallest_cards_shared_memory(architecture: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.triton_compile", str(architecture), *CASES]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith(f"sm_{architecture}")}
    assert {"_norm", "_add", "_copy", "_rope_append", "_attend", "_linear"} <= names
