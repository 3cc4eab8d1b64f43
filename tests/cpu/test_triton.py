"""The Triton kernels compute what torch does: every kernel on random and odd shapes, in Triton's interpreter (compiled where there is a CUDA device)."""

from __future__ import annotations

import logging
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined: before their first import
pytest.importorskip("triton", reason="triton is not installed: no Triton kernel is tested here (pip install -e '.[dev]' on Linux)", exc_type=ImportError)

import numpy as np
import triton

from tests.triton_cases import CASES, PROGRAMS, drawn, run_case
from twinpilots.kernels.abi import Op
from twinpilots.kernels.triton import FEW_ROWS, cannot_build, linear, multiplies, unavailable
from twinpilots.model.weight_format import FORMATS
from twinpilots.runtime.machine import Machine
from twinpilots.runtime.torch_ops import execute
from twinpilots.runtime.triton_ops import SCRATCH_BYTES, TritonOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9):  # 3.6 compiles every kernel, but cannot interpret loops
    pytest.skip(f"the interpreter of triton {triton.__version__} does not get on with numpy 2.4: no Triton kernel is tested here", allow_module_level=True)


@pytest.mark.parametrize("name, seed", [(name, seed) for name in CASES for seed in range(1 if "q" in name else 2)])
def test_kernels_compute_what_torch_does(name: str, seed: int) -> None:
    if CASES[name].compiled_only and DEVICE.type == "cpu":
        pytest.skip("the interpreter rounds differently: shown on a CUDA device only")
    run_case(name, seed, DEVICE)


def product(x: torch.Tensor, w: torch.Tensor, name: str = "fp16") -> torch.Tensor:
    """x [M, K] @ w [K, N], as one panel."""
    out = torch.zeros(x.shape[0], w.shape[1], device=DEVICE)
    linear.linear(x, w.reshape(-1), out, FORMATS[name], w.shape[1], linear.Finish(), programs=1, scratch=torch.empty(1024, device=DEVICE))
    return out


def test_large_activations_and_what_is_not_a_number_are_kept() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 100, device=DEVICE), torch.randn(100, 24, device=DEVICE).half()
    x[1] *= 1e6
    x[2, 7], x[3, 9] = torch.nan, torch.inf
    found = product(x, w)
    wanted = x.double() @ w.double()
    assert ((found[:2] - wanted[:2]).norm(dim=1) < 1e-3 * wanted[:2].norm(dim=1)).all()
    assert found[2:].isnan().all()


def test_the_parts_of_k_fill_the_device_and_fit_their_workspace() -> None:
    sizes = {"quantized": True, "programs": 264}
    few = linear.cut(1, 4096, 4096, 64, 1, room=1 << 23, **sizes)
    assert few.splits * 64 >= 264 and few.split_inputs % few.bk == 0 and few.splits * few.split_inputs >= 4096
    assert linear.cut(1, 128256, 4096, 64, 1, room=1 << 23, **sizes).splits == 1, "as many panels need no parts"
    assert linear.cut(64, 4096, 4096, 64, 2, room=64 * 4096 * 2, **sizes).splits == 1, "the workspace holds one part"
    assert linear.cut(1, 64, 128, 64, 1, room=1 << 23, **sizes).splits == 1


def test_the_rules_of_choice() -> None:
    assert multiplies(FORMATS["q4_k"], 10_000)
    assert multiplies(FORMATS["bf16"], FEW_ROWS) and not multiplies(FORMATS["bf16"], FEW_ROWS + 1)
    assert unavailable(torch.device("cpu")) == "cpu is no CUDA device"


def test_a_kernel_that_cannot_be_built_is_left_to_torch_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from triton.errors import TritonError

    both, insns, meta = drawn(CASES["norm"], 0)
    kernels, calls = TritonOps(DEVICE, PROGRAMS), []

    def fails(*_: object) -> int:
        calls.append(1)
        raise TritonError("ptxas died\nat length")

    kernels._ops[Op.NORM] = fails
    arenas = [torch.from_numpy(both.copy()).to(DEVICE) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for arena, chosen in zip(arenas, (kernels, None), strict=True):
            machine = Machine(both, arena)
            for _ in range(2):
                machine.begin(meta)
                execute(machine, insns[0], chosen)
    assert torch.equal(*arenas)
    assert len(calls) == 1 and [record.getMessage().splitlines() for record in caplog.records] == [
        [f"the Triton kernel of NORM cannot be built on {DEVICE}, torch's operations run instead, more slowly: TritonError: ptxas died"]
    ]


def test_errors_of_the_device_are_no_build_failures() -> None:
    assert cannot_build(RuntimeError("PassManager::run failed")) and cannot_build(RuntimeError("Failed to find C compiler."))
    assert not cannot_build(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")) and not cannot_build(ValueError("shape"))


def test_a_decode_layer_takes_a_launch_or_two_per_instruction() -> None:
    """And all of them share one workspace."""
    counts, total = {}, 0
    for name in ("norm", "linear q4_1", "attention", "linear_in q4_1", "add", "copy"):
        kernels = run_case(name, 1, DEVICE)
        counts.update(kernels.launches)
        total += kernels.scratch.numel() * 4 if "linear" in name else 0
    assert counts.keys() == {"NORM", "LINEAR", "ROPE_APPEND", "ATTEND", "LINEAR_IN", "ADD", "COPY"}
    assert all(counts[op] == 1 for op in ("NORM", "ROPE_APPEND", "ADD", "COPY")) and max(counts.values()) <= 2
    assert total == 2 * SCRATCH_BYTES


def test_the_metadata_is_copied_once_per_pass() -> None:
    both, _, meta = drawn(CASES["attention"], 0)
    machine = Machine(both, torch.from_numpy(both.copy()).to(DEVICE))
    machine.begin(meta)
    batch = machine.batch
    assert machine.batch is batch and np.array_equal(batch.device_words.cpu().numpy(), batch.words)
    assert batch.words.size < 400, "the metadata, not all that lies behind it"
