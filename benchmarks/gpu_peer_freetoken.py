"""FreeToken on the points of `make gpu-bench`: its own engine with its own random weights, where they fit, for of a dense model it offloads nothing.

``python -m benchmarks.gpu_peer_freetoken TASK`` (JSON) prints one JSON line per point. Owns how FreeToken (written against 0.1.2) is driven: a folder that
looks like a checkpoint to it, room for exactly the point's tokens, its offline interface timed from outside. It has a process per point, for it wants to be the
first to touch CUDA. Knows nothing of our engine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.gpu_peer_torch import DTYPES, TIMED, PeerTask, config_fields, kv_bytes, run_points
from benchmarks.gpu_points import GIB, Point
from benchmarks.gpu_workers import Emit, serve
from twinpilots.errors import LimitError
from twinpilots.model.dummy import CONFIGS
from twinpilots.units import format_bytes

RESERVE_BYTES = 3 * GIB // 2  # under the cap: context, kernels, captured graphs and what a pass computes with
GENERATED = 48  # tokens per sequence between the two timings of a decode point
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}  # dense, of ours


def run_peer(task: PeerTask, emit: Emit) -> None:
    run_points(task, emit, figures)


def figures(point: Point) -> Mapping[str, Any]:
    """LimitError, before anything is loaded, where it cannot run the point."""
    if (reason := why_not(point)) is not None:
        raise LimitError(reason)
    with tempfile.TemporaryDirectory(prefix="twinpilots-freetoken-") as folder:
        write_checkpoint(point, Path(folder))
        return measured(engine(point, folder), point)


def why_not(point: Point) -> str | None:
    """Nothing of a dense model leaves the card: FreeToken offloads the routed experts of mixtures alone, and a mixture is nothing that we run."""
    spec = point.spec
    if point.quantization is not None or CONFIGS[short_name(point)]["model_type"] not in ARCHITECTURES:
        return f"it runs none of {point.model}{f' in {point.quantization}' if point.quantization else ''}"
    weights, kv = spec.linear_bytes + (0 if spec.tied else spec.embedding_bytes), kv_bytes(spec, point)
    if weights + kv + RESERVE_BYTES > point.gpu_memory:
        return (
            f"it offloads experts only and keeps a dense model on the card: weights of {format_bytes(weights)} and KV of {format_bytes(kv)} do not fit in "
            f"{format_bytes(point.gpu_memory)}, of which {format_bytes(RESERVE_BYTES)} are for all else"
        )
    return None


def short_name(point: Point) -> str:
    return point.model.removeprefix("dummy:")


def write_checkpoint(point: Point, folder: Path) -> None:
    """Config and a tokenizer of one word: prompts are token ids, and what is generated is not read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    kind = CONFIGS[short_name(point)]["model_type"]
    config = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, "dtype": DTYPES[point.spec.weight_dtype], "hidden_act": "silu"} | config_fields(point)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)


def settings(point: Point) -> dict[str, Any]:
    """As many tokens of KV as the point's sequences need, one more for the step that is on its way when they end."""
    longest = point.context + GENERATED + 2
    return {
        "use_dummy_weight": True, "max_running_req": point.num_seqs, "max_seq_len_override": longest, "num_token_override": point.num_seqs * longest,
        "cuda_graph_max_bs": point.num_seqs,
    }  # fmt: skip


def engine(point: Point, folder: str) -> Any:
    import torch
    from freetoken.llm import LLM

    return LLM(folder, dtype=getattr(torch, DTYPES[point.spec.weight_dtype]), **settings(point))


def measured(llm: Any, point: Point) -> dict[str, Any]:
    """Tokens per second. Decode: what more tokens take after the same prompts, which its prefix cache knows by then. Prefill: prompts that it has not seen."""
    random, vocab = Random(0), point.spec.vocab_size
    prompts = _prompts(random, point, vocab)
    seconds = []
    _generate_s(llm, prompts, 2)
    for _ in range(TIMED):
        if point.kind == "prefill":
            seconds.append(_generate_s(llm, _prompts(random, point, vocab), 1))
        else:
            seconds.append(-_generate_s(llm, prompts, 1) + _generate_s(llm, prompts, 1 + GENERATED))
    if min(seconds) <= 0:
        raise ValueError(f"{GENERATED} tokens more took {min(seconds):.3g} s: nothing was measured")
    tokens = point.num_seqs * (GENERATED if point.kind == "decode" else point.context)
    return {"tokens_per_s": tokens * TIMED / sum(seconds), "pass_s": [each / (GENERATED if point.kind == "decode" else 1) for each in seconds]}


def _prompts(random: Random, point: Point, vocab: int) -> list[list[int]]:
    return [[random.randrange(3, vocab) for _ in range(point.context)] for _ in range(point.num_seqs)]


def _generate_s(llm: Any, prompts: list[list[int]], num_tokens: int) -> float:
    from freetoken.core import SamplingParams

    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens))
    return time.perf_counter() - began


if __name__ == "__main__":
    import sys

    serve(sys.argv[1:], {"peer": PeerTask}, {"peer": run_peer})
