"""Random instructions on random bytes, for whatever interprets them: each function draws shapes, places operands in a test machine, and gives the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.cpu.native_twin import DTYPES, KV_DTYPES, Batch, KvLayout, Machine, Seq, encode, insn
from twinpilots.kernels.abi import NULL, Dtype, Epilogue, NormKind, Op, Space
from twinpilots.model.weight_format import WeightFormat

Program = Callable[[np.random.Generator, Machine], tuple[list[np.ndarray], Batch]]
PAGE, ARENA = 4, 1 << 18


def random_batch(rng: np.random.Generator, *, vocab: int = 30, groups: Sequence[int] = (0, 0, 1, 2)) -> Batch:
    """Sequences of random lengths and contexts in sorted groups, each with its own pages in random order, and home pages of their own."""
    numbers = iter(rng.permutation(200).tolist())
    seqs = []
    for group in sorted(rng.choice(groups, rng.integers(1, 5)).tolist()):
        query, context = int(rng.integers(1, 7)), int(rng.integers(0, 12))
        count = -(-(query + context) // PAGE)
        pages = tuple(next(numbers) % 100 for _ in range(count)) if group != 1 else tuple(next(numbers) for _ in range(count))
        seqs.append(Seq(query, context, group, pages, home=tuple(next(numbers) for _ in range(count)) if group == 1 else None))
    rows = sum(seq.query for seq in seqs)
    used = [page for seq in seqs for page in (*seq.pages, *(seq.home or ()))]
    if len(set(used)) < len(used):  # a page belongs to one sequence
        return random_batch(rng, vocab=vocab, groups=groups)
    logits = sorted(rng.choice(rows, rng.integers(1, rows + 1), replace=False).tolist())
    return Batch(seqs, page_size=PAGE, tokens=rng.integers(0, vocab, rows).tolist(), logit_rows=logits)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def maybe(rng: np.random.Generator, machine: Machine, values: np.ndarray) -> int:
    return machine.put(values) if rng.random() < 0.6 else NULL


def span(rng: np.random.Generator) -> dict[str, int]:
    """Some rows of the batch: groups [glo, ghi), or the logit rows."""
    glo = int(rng.integers(0, 3))
    return {"row_kind": int(rng.random() < 0.2), "glo": glo, "ghi": int(rng.integers(glo, 4))}


def embed(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, width, vocab, unit, layout = random_batch(rng), int(rng.integers(1, 40)), 30, int(rng.integers(1, 33)), int(rng.integers(0, 2))
    dtype, pos_dtype = (DTYPES[i] for i in rng.integers(0, 3, 2))
    table, positions = m.put(encode(floats(rng, vocab * width), dtype)), maybe(rng, m, encode(floats(rng, 60 * width), pos_dtype))
    dst = m.put(floats(rng, batch.num_tokens, width + 3))
    return [insn(Op.EMBED, dst, width + 3, table, layout, dtype, width, unit, vocab, positions, 2, pos_dtype, f=(1.5,), glo=0, ghi=3)], batch


def norm(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, width = random_batch(rng), int(rng.integers(1, 50))
    dst, src = m.put(floats(rng, batch.num_tokens, width)), m.put(floats(rng, batch.num_tokens, width + 1))
    kind = int(rng.integers(0, 2))
    gain, bias = (maybe(rng, m, floats(rng, width)) for _ in range(2))
    return [insn(Op.NORM, dst, width, src, width + 1, gain, bias, width, kind, f=(1e-5,), **span(rng))], batch


def linear(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, rows, width, unit = random_batch(rng), int(rng.integers(1, 50)), int(rng.integers(1, 40)), int(rng.integers(1, 24))
    dtype, epilogue, space = DTYPES[rng.integers(0, 3)], Epilogue(int(rng.integers(0, 4))), Space(int(rng.integers(0, 2)))
    halves = 2 if epilogue == Epilogue.ACT_MUL else 1
    w = m.put(encode(floats(rng, halves * rows * width), dtype), space)
    dst, src = m.put(floats(rng, batch.num_tokens, rows + 2), space), m.put(floats(rng, batch.num_tokens, width + 1), space)
    bias, bias2 = maybe(rng, m, floats(rng, rows)), maybe(rng, m, floats(rng, rows))
    act = int(rng.integers(0, 4))
    return [insn(Op.LINEAR, dst, rows + 2, src, width + 1, w, dtype, rows, width, unit, epilogue, act, bias, bias2, f=(3.0,), **span(rng))], batch


def linear_in(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, rows, width, dtype = random_batch(rng), int(rng.integers(1, 50)), int(rng.integers(1, 90)), DTYPES[rng.integers(0, 3)]
    w, dst, src = m.put(encode(floats(rng, rows * width), dtype)), m.put(floats(rng, batch.num_tokens, width)), m.put(floats(rng, batch.num_tokens, rows + 4))
    return [insn(Op.LINEAR_IN, dst, width, src, rows + 4, w, dtype, rows, width, int(rng.integers(0, 2)), **span(rng))], batch


def random_pages(rng: np.random.Generator, layout: KvLayout, count: int, spare_bytes: int = 0) -> np.ndarray:
    """``count`` pages full of ordinary numbers, each with ``spare_bytes`` behind it: [count, stride]."""
    pages = np.zeros((count, layout.page_bytes + spare_bytes), np.uint8)
    for page in pages:
        values = layout.values(page)
        if layout.dtype == Dtype.INT8:
            values[:], layout.scales(page)[:] = rng.integers(-127, 128, values.shape), rng.uniform(0.01, 0.03, layout.scales(page).shape)
        else:
            values[:] = encode(floats(rng, *values.shape), layout.dtype)
    return pages


def attention(rng: np.random.Generator, m: Machine, kv_dtype: Dtype = Dtype.FP32) -> tuple[list[np.ndarray], Batch]:
    """ROPE_APPEND, then ATTEND over random older KV: the rows of one group."""
    group = int(rng.integers(0, 3))
    batch, kv_heads, repeat, dim = random_batch(rng, groups=(group,)), int(rng.integers(1, 3)), int(rng.integers(1, 4)), 2 * int(rng.integers(1, 6))
    heads, rotary = kv_heads * repeat, 2 * int(rng.integers(1, dim // 2 + 1))
    pages = random_pages(rng, KvLayout(kv_heads, PAGE, dim, kv_dtype), 200, 64)
    kv, stride = m.put(pages), pages.shape[1]
    ld = (heads + 2 * kv_heads) * dim + 1
    qkv, dst = m.put(floats(rng, batch.num_tokens, ld)), m.put(floats(rng, batch.num_tokens, heads * dim))
    cos, sin = (m.put(floats(rng, 40, rotary // 2)) for _ in range(2))
    tables = (cos, sin) if rng.random() < 0.8 else (NULL, NULL)
    gains = [maybe(rng, m, floats(rng, dim)) for _ in range(2)]
    window, softcap = int(rng.choice([0, 1, 5])), float(rng.choice([0.0, 2.0]))
    rows = {"glo": group, "ghi": group + 1}
    append = insn(Op.ROPE_APPEND, qkv, ld, *gains, *tables, rotary, heads, kv_heads, dim, kv, stride, PAGE, kv_dtype, f=(1e-6,), **rows)
    return [append, insn(Op.ATTEND, dst, heads * dim, qkv, ld, heads, kv_heads, dim, kv, stride, PAGE, kv_dtype, window, f=(0.3, softcap), **rows)], batch


def half_precision_attention(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    """As `attention` with 16-bit KV, without the append: values that round to neighbours would differ by far more than fp32 rounding."""
    insns, batch = attention(rng, m, DTYPES[rng.integers(1, 3)])
    return insns[1:], batch


def int8_attention(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    """The same with int8 KV."""
    insns, batch = attention(rng, m, Dtype.INT8)
    return insns[1:], batch


def add(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, width = random_batch(rng), int(rng.integers(1, 50))
    x, (p, q) = m.put(floats(rng, batch.num_tokens, width)), (maybe(rng, m, floats(rng, batch.num_tokens, width)) for _ in range(2))
    bias, gain, gain_bias = (maybe(rng, m, floats(rng, width)) for _ in range(3))
    kind = NormKind(int(rng.integers(0, 2)))
    return [insn(Op.ADD, x, width, p, width, q, width, bias, gain, gain_bias, kind, width, f=(1e-2,), **span(rng))], batch


def copy(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    batch, columns, up = random_batch(rng), int(rng.integers(1, 20)), bool(rng.integers(0, 2))
    pad = int(rng.integers(0, 2)) * 5
    buffers = [m.put(floats(rng, batch.num_tokens, columns + pad), space) for space in (Space.GPU, Space.HOST)]
    dst, src = buffers if up else reversed(buffers)
    return [insn(Op.COPY, dst, columns + pad, src, columns + pad, columns, int(not up), **span(rng))], batch


def packets(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    source, target = m.put(rng.integers(0, 256, 5000, dtype=np.uint8)), m.put(np.zeros(6000, np.uint8), Space.GPU)
    segments = np.array([(target + 3000, source, 1001), (target + 17, source + 2000, 500), (target, source, 0)], np.int64)
    poisoned = insn(Op.POISON, target + 20, 99)
    return [insn(Op.LOAD, m.put(segments), len(segments), 1501), poisoned], random_batch(rng)


def streamed_kv(rng: np.random.Generator, m: Machine) -> tuple[list[np.ndarray], Batch]:
    dtype, kv_heads, dim = KV_DTYPES[rng.integers(0, 4)], int(rng.integers(1, 3)), int(rng.integers(1, 6))
    stride = KvLayout(kv_heads, PAGE, dim, dtype).page_bytes
    home, staging = (m.put(rng.integers(0, 256, 200 * stride, dtype=np.uint8), space) for space in (Space.HOST, Space.GPU))
    args = (staging, home, stride, PAGE, kv_heads, dim, dtype)
    return [insn(Op.LOAD_KV, *args, glo=1, ghi=2), insn(Op.STORE_KV, *args, glo=1, ghi=2)], random_batch(rng, groups=(1, 0))


def random_blocks(fmt: WeightFormat, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Row blocks of random codes, with f16 scales of sensible size."""
    rng = np.random.default_rng(seed)
    result = rng.integers(0, 256, (rows, blocks, fmt.block_bytes), dtype=np.uint8)
    halves = rng.uniform(0.01, 1, (rows, blocks, 2)).astype(np.float16).view(np.uint8).reshape(rows, blocks, 4)
    if fmt.name == "q6_k":
        result[:, :, 208:] = halves[:, :, :2]
    else:
        count = 2 if fmt.name in ("q8_0", "q4_0", "q5_0") else 4
        result[:, :, :count] = halves[:, :, :count]
    return result
