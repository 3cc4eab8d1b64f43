"""The Triton kernels against their torch twins, case by case: random instructions on random bytes, run by both on the same device.

Runs without pytest, so that `make gpu-check` can run the same cases compiled on a card (`tests/cpu/test_triton.py` interprets them on the CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tests.cpu.native_twin import Batch, KvLayout, Machine, Seq, encode, insn
from tests.programs import (
    Program,
    add,
    attention,
    copy,
    floats,
    half_precision_attention,
    int8_attention,
    linear,
    linear_in,
    maybe,
    norm,
    random_blocks,
    random_pages,
)
from twinpilots.kernels import quant_format
from twinpilots.kernels.abi import DTYPE_CODES, EVENTS_OFFSET, Dtype, Epilogue, Op, Space, address
from twinpilots.model.weight_format import FORMATS, WeightFormat
from twinpilots.runtime.machine import OFFSET_MASK, Insn, decode
from twinpilots.runtime.machine import Machine as TorchMachine
from twinpilots.runtime.torch_ops import execute
from twinpilots.runtime.triton_ops import TritonOps

ARENA = 1 << 21
PROGRAMS = 6  # as if so many ran at once: some of these small cases' launches are split
Drawn = tuple[list[np.ndarray], Batch]

# ---- more programs: what interpreters share is in tests/programs.py


def decoding(rng: np.random.Generator, most: int = 20) -> Batch:
    """Up to ``most`` one-token sequences."""
    return Batch([Seq(1) for _ in range(int(rng.integers(1, most + 1)))])


def packed_linear(fmt: WeightFormat, rng: np.random.Generator, m: Machine) -> Drawn:
    """Panels of any width, odd ones (whose lanes lie off their alignment) included."""
    batch, rows, blocks, unit = decoding(rng), int(rng.integers(1, 40)), int(rng.integers(1, 1 + 512 // fmt.block)), int(rng.integers(4, 30))
    epilogue, width = Epilogue(int(rng.integers(0, 4))), blocks * fmt.block
    gate, up = random_blocks(fmt, rows, blocks, 1), random_blocks(fmt, rows, blocks, 2)
    w = m.put(quant_format.pack_gate_up(gate, up, fmt, unit) if epilogue == Epilogue.ACT_MUL else quant_format.pack_out(gate, fmt, unit))
    src, dst = m.put(floats(rng, batch.num_tokens, width + 1) / 30), m.put(floats(rng, batch.num_tokens, rows + 2))
    biases = maybe(rng, m, floats(rng, rows)), maybe(rng, m, floats(rng, rows))
    act = int(rng.integers(0, 4))
    return [insn(Op.LINEAR, dst, rows + 2, src, width + 1, w, DTYPE_CODES[fmt.name], rows, width, unit, epilogue, act, *biases, 0, f=(3.0,))], batch


def packed_linear_in(fmt: WeightFormat, rng: np.random.Generator, m: Machine) -> Drawn:
    batch, width, inputs = decoding(rng), int(rng.integers(1, 100)), int(rng.integers(1, 1 + 512 // fmt.block)) * fmt.block
    w, src = m.put(quant_format.pack_in(random_blocks(fmt, width, inputs // fmt.block), fmt)), m.put(floats(rng, batch.num_tokens, inputs))
    dst = m.put(floats(rng, batch.num_tokens, width))
    return [insn(Op.LINEAR_IN, dst, width, src, inputs, w, DTYPE_CODES[fmt.name], inputs, width, int(rng.integers(0, 2)), 0)], batch


def deep_linear(dtype: Dtype, rng: np.random.Generator, m: Machine) -> Drawn:
    """Few outputs, many inputs, now and then a row beyond fp16's range: K is split."""
    batch, rows, width, unit = decoding(rng, 5), int(rng.integers(1, 70)), int(rng.integers(200, 500)), int(rng.integers(8, 70))
    w, dst = m.put(encode(floats(rng, rows * width), dtype)), m.put(floats(rng, batch.num_tokens, rows))
    src = m.put(floats(rng, batch.num_tokens, width) * rng.choice([1.0, 1e5], (batch.num_tokens, 1)).astype(np.float32))
    return [insn(Op.LINEAR, dst, rows, src, width, w, dtype, rows, width, unit, Epilogue.NONE, 0, -1, -1)], batch


def long_attention(dtype: Dtype, rng: np.random.Generator, m: Machine) -> Drawn:
    """Contexts of several blocks of keys, decoding beside a chunk of a prompt: the context is split."""
    page, numbers, seqs = 16, iter(rng.permutation(64).tolist()), []
    for _ in range(int(rng.integers(1, 4))):
        query, context = int(rng.choice([1, 1, 7])), int(rng.integers(0, 160))
        seqs.append(Seq(query, context, 0, tuple(next(numbers) for _ in range(-(-(query + context) // page)))))
    batch, kv_heads, dim = Batch(seqs, page_size=page), int(rng.integers(1, 3)), int(rng.choice([8, 12, 16]))
    heads, pages = kv_heads * int(rng.choice([1, 3, 4])), random_pages(rng, KvLayout(kv_heads, page, dim, dtype), 64)
    stride, ld = pages.shape[1], (heads + 2 * kv_heads) * dim
    kv, qkv = m.put(pages), m.put(floats(rng, batch.num_tokens, ld))
    dst, window, softcap = m.put(floats(rng, batch.num_tokens, heads * dim)), int(rng.choice([0, 90])), float(rng.choice([0.0, 2.0]))
    return [insn(Op.ATTEND, dst, heads * dim, qkv, ld, heads, kv_heads, dim, kv, stride, page, dtype, window, f=(0.3, softcap))], batch


def append(dtype: Dtype, rng: np.random.Generator, m: Machine) -> Drawn:
    """Without norm and rotation only the store's rounding is left: the pages must have the same bits."""
    insns, batch = attention(rng, m, dtype)
    insns[0]["a"][2:6] = -1
    return insns[:1], batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """``tolerance``: relative RMS over all that changed. A product rounds its activations where the twin on a CPU does not: the interpreter's is that bound."""

    program: Program
    tolerance: float
    takes_all: bool = True  # every instruction is made to take all rows; else it keeps the group that it drew
    compiled_only: bool = False


def _cases() -> dict[str, Case]:
    cases = {
        "norm": Case(program=norm, tolerance=1e-6), "add": Case(program=add, tolerance=1e-6), "copy": Case(program=copy, tolerance=0.0),
        "linear": Case(program=linear, tolerance=1e-2), "linear_in": Case(program=linear_in, tolerance=1e-2),
        "attention": Case(program=attention, tolerance=2e-6, takes_all=False),
        "attention 16-bit": Case(program=half_precision_attention, tolerance=2e-3, takes_all=False),
        "attention int8": Case(program=int8_attention, tolerance=2e-3, takes_all=False),
        "append int8": Case(program=partial(append, Dtype.INT8), tolerance=0.0, takes_all=False),
        "append fp16": Case(program=partial(append, Dtype.FP16), tolerance=0.0, takes_all=False),
        "append bf16": Case(program=partial(append, Dtype.BF16), tolerance=0.0, takes_all=False, compiled_only=True),  # the interpreter truncates to bf16
    }  # fmt: skip
    for dtype, product, softmax in ((Dtype.FP32, 2e-6, 2e-6), (Dtype.BF16, 1e-2, 2e-3), (Dtype.FP16, 1e-3, 2e-3), (Dtype.INT8, None, 2e-3)):
        if product is not None:
            cases[f"deep linear {dtype.name.lower()}"] = Case(program=partial(deep_linear, dtype), tolerance=product)
        cases[f"long attention {dtype.name.lower()}"] = Case(program=partial(long_attention, dtype), tolerance=softmax)
    for name, fmt in FORMATS.items():
        if fmt.is_quantized:
            cases[f"linear {name}"] = Case(program=partial(packed_linear, fmt), tolerance=1e-3)
            cases[f"linear_in {name}"] = Case(program=partial(packed_linear_in, fmt), tolerance=1e-3)
    return cases


CASES = _cases()


# ---- running a case


def moved(value: int) -> int:
    """Where an address of a test machine lies once both of its arenas are one, the GPU's behind the host's; other arguments stay as they are."""
    if value >> 56 == Space.GPU:
        return address(Space.GPU, ARENA + (value & OFFSET_MASK))
    return address(Space.GPU, value) if value >= EVENTS_OFFSET else value


def drawn(case: Case, seed: int) -> tuple[np.ndarray, list[Insn], int]:
    """(bytes of both arenas, instructions on them, where the metadata lies)."""
    machine = Machine(ARENA)
    insns, batch = case.program(np.random.default_rng(seed), machine)
    meta = machine.put(batch.words)
    if case.takes_all:
        for one in insns:
            one["glo"], one["ghi"] = 0, 3
    both = np.concatenate([machine.host, machine.gpu])
    return both, [one._replace(a=[moved(value) for value in one.a]) for one in decode(np.stack(insns))], meta


def run_case(name: str, seed: int, device: torch.device) -> TritonOps:
    """Both twins on ``device``. AssertionError when they differ by more than the tolerance, or when torch ran what the kernels should have."""
    both, insns, meta = drawn(CASES[name], seed)
    kernels, results = TritonOps(device, PROGRAMS), []
    for chosen in (kernels, None):
        arena = torch.from_numpy(both.copy()).to(device)
        machine = TorchMachine(both, arena)
        machine.begin(meta)
        for one in insns:
            execute(machine, one, chosen)
        results.append(arena.cpu().numpy().view(np.uint32))
    found, wanted = results
    assert set(kernels.launches) == {Op(one.op).name for one in insns}, f"launched {dict(kernels.launches)}"
    if CASES[name].tolerance == 0.0:
        assert np.array_equal(found, wanted), "the bits differ"
        return kernels
    changed = (found != both.view(np.uint32)) | (wanted != both.view(np.uint32))
    mine, theirs = found[changed].view(np.float32).astype(np.float64), wanted[changed].view(np.float32).astype(np.float64)
    error = np.sqrt(np.mean((mine - theirs) ** 2) / np.mean(theirs**2))
    assert error <= CASES[name].tolerance, f"relative RMS error {error:.1e}, {CASES[name].tolerance:.0e} allowed"
    return kernels
