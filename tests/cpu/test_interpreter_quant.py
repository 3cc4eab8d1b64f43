"""The torch interpreter runs quantised linears and embeddings as the native one does: same weights out of the panels, same rounding of the activations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.cpu.native_twin import Batch, Machine, insn, native, relative_rms
from tests.programs import floats, maybe, random_batch, random_blocks
from tests.unit.test_quant_format import QUANTIZED
from twinpilots.kernels import quant_format
from twinpilots.kernels.abi import DTYPE_CODES, NULL, Activations, Epilogue, Op, Space
from twinpilots.model.weight_format import FORMATS, WeightFormat
from twinpilots.runtime.interpreter import run_program
from twinpilots.runtime.torch_quant import panel_weights, rounded

Case = Callable[[np.random.Generator, Machine, WeightFormat, int], tuple[np.ndarray, Batch, tuple[int, int]]]
ARENA = 1 << 20


def linear(rng: np.random.Generator, m: Machine, fmt: WeightFormat, mode: int) -> tuple[np.ndarray, Batch, tuple[int, int]]:
    batch, rows, width, unit = random_batch(rng), int(rng.integers(1, 50)), 2 * fmt.block, int(rng.integers(1, 24))
    epilogue = (Epilogue.NONE, Epilogue.ACT_MUL)[int(rng.integers(0, 2))]
    gate, up = random_blocks(fmt, rows, 2, 1), random_blocks(fmt, rows, 2, 2)
    packed = quant_format.pack_gate_up(gate, up, fmt, unit) if epilogue == Epilogue.ACT_MUL else quant_format.pack_out(gate, fmt, unit)
    space = Space(int(rng.integers(0, 2)))
    w, src, dst = m.put(packed, space), m.put(floats(rng, batch.num_tokens, width) / 30, space), m.put(floats(rng, batch.num_tokens, rows))
    biases = maybe(rng, m, floats(rng, rows)), maybe(rng, m, floats(rng, rows))
    return insn(Op.LINEAR, dst, rows, src, width, w, DTYPE_CODES[fmt.name], rows, width, unit, epilogue, 0, *biases, mode), batch, (dst, rows)


def linear_in(rng: np.random.Generator, m: Machine, fmt: WeightFormat, mode: int) -> tuple[np.ndarray, Batch, tuple[int, int]]:
    batch, width, inputs = random_batch(rng), int(rng.integers(1, 70)), 3 * fmt.block
    w, src = m.put(quant_format.pack_in(random_blocks(fmt, width, 3), fmt)), m.put(floats(rng, batch.num_tokens, inputs))
    dst = m.put(floats(rng, batch.num_tokens, width))
    return insn(Op.LINEAR_IN, dst, width, src, inputs, w, DTYPE_CODES[fmt.name], inputs, width, int(rng.integers(0, 2)), mode), batch, (dst, width)


def embed(rng: np.random.Generator, m: Machine, fmt: WeightFormat, mode: int) -> tuple[np.ndarray, Batch, tuple[int, int]]:
    batch, unit, width = random_batch(rng), int(rng.integers(1, 33)), 2 * fmt.block
    table, dst = m.put(quant_format.pack_out(random_blocks(fmt, 30, 2), fmt, unit)), m.put(floats(rng, batch.num_tokens, width))
    return insn(Op.EMBED, dst, width, table, 1, DTYPE_CODES[fmt.name], width, unit, 30, NULL, 0, 0, f=(1.5,)), batch, (dst, width)


@pytest.mark.parametrize("case", [linear, linear_in, embed], ids=lambda case: case.__name__)
@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("mode", list(Activations), ids=lambda mode: mode.name)
@pytest.mark.parametrize("seed", range(3))
def test_both_interpreters_compute_the_same(case: Case, fmt: WeightFormat, mode: int, seed: int) -> None:
    native()
    mine, theirs = (Machine(ARENA) for _ in range(2))
    step, batch, (dst, width) = case(np.random.default_rng(seed), mine, fmt, mode)
    case(np.random.default_rng(seed), theirs, fmt, mode)
    assert run_program(mine.entry([step], batch), mine.host, torch.from_numpy(mine.gpu)) == 0
    assert theirs.run([step], batch) == 0
    found, wanted = (machine.view(dst, np.float32, (batch.num_tokens, width)).copy() for machine in (mine, theirs))
    assert relative_rms(found, wanted) < 3e-6
    for machine in (mine, theirs):
        machine.view(dst, np.float32, (batch.num_tokens, width))[:] = 0
    assert np.array_equal(mine.host, theirs.host), "one of them wrote elsewhere"


@pytest.mark.parametrize("fmt", QUANTIZED, ids=lambda fmt: fmt.name)
def test_several_panels_are_unpacked_at_once(fmt: WeightFormat) -> None:
    blocks = random_blocks(fmt, 15, 2)
    packed = torch.from_numpy(quant_format.pack_out(blocks, fmt, 5))
    found = panel_weights(packed, fmt, 3, 5, 2 * fmt.block).reshape(15, -1)
    assert np.array_equal(found.numpy(), quant_format.dequantize(blocks, fmt))


def test_rounding_passes_on_what_is_not_a_number() -> None:
    x = torch.randn(3, 64)
    x[0, 5], x[1, 40], x[2, :32] = torch.nan, torch.inf, 1e-35
    found = rounded(x, NULL)
    assert found[0, :32].isnan().all()
    assert found[1, 32:].isnan().all()
    assert (found[2, :32] == 0).all()
    assert torch.allclose(found[0, 32:], x[0, 32:], rtol=0, atol=float(x[0, 32:].abs().max()) / 65000)
    assert (rounded(x, Activations.FAST)[2, 32:] - x[2, 32:]).abs().max() <= x[2, 32:].abs().max() / 253


def test_formats_have_codes() -> None:
    assert set(DTYPE_CODES) == {*FORMATS, "int8"}  # int8: of KV only
