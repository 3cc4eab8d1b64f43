"""One engine of the side by side run, in a process of its own: ``python benchmarks/peer_engines.py SETUP`` (JSON), with the Python that has the engine.

Owns how each engine is driven. Speaks JSON lines: first ``{"load_s"}`` or ``{"error"}``, then for each ``{"sequences", "input_len", "output_len", "seed"}``
``{"seconds", "generated"}``; the end of input ends it. Every engine gets the same token ids and generates exactly ``output_len`` tokens of each sequence,
greedily; a run is timed around the one call that does it all. Imports nothing but the standard library at its top: peers live in environments of their own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

PROMPT_IDS = range(3, 100)  # tokens that every vocabulary has
MOST_SEQUENCES = 16
SLOT_TOKENS = 640  # of each sequence: the longest prompt, its output, and some room

Prompts = Sequence[Sequence[int]]


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: Prompts, output_len: int) -> int:
        """Generate for all prompts at once; the number of tokens."""
        ...


class LlamaCpp:
    """llama.cpp's server loop through xllamacpp, without HTTP: one request per sequence, its own continuous batching."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = setup["model"]
        params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = MOST_SEQUENCES * SLOT_TOKENS, MOST_SEQUENCES, 512, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
        params.n_gpu_layers, params.cache_prompt, params.cache_ram_mib, params.verbosity = 0, False, 0, -1
        self._server = xllamacpp.Server(params)

    def generate(self, prompts: Prompts, output_len: int) -> int:
        counts: list[int] = []
        threads = [threading.Thread(target=lambda prompt=prompt: counts.append(self._complete(prompt, output_len))) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts)

    def _complete(self, prompt: Sequence[int], output_len: int) -> int:
        request = {"prompt": list(prompt), "max_tokens": output_len, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return int(self._server.handle_completions(request)["usage"]["completion_tokens"])


class Transformers:
    """transformers' own `generate` with its default attention and cache."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(setup["threads"])
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, setup["dtype"])).eval()

    def generate(self, prompts: Prompts, output_len: int) -> int:
        with self._torch.inference_mode():
            ids = self._torch.tensor(prompts)
            options = {"max_new_tokens": output_len, "min_new_tokens": output_len, "do_sample": False, "pad_token_id": 0}
            found = self._model.generate(ids, attention_mask=self._torch.ones_like(ids), **options)
        return int((found.shape[1] - ids.shape[1]) * len(prompts))


class TwinPilots:
    """Ours, on the CPU alone."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        from twinpilots import LLM

        arguments = {"quantization": setup["quantization"], "device": "cpu", "threads": setup["threads"], "max_num_seqs": MOST_SEQUENCES}
        arguments["enable_prefix_caching"] = False  # every round reads its prompts again
        self._llm = LLM(setup["model"], max_model_len=SLOT_TOKENS, **arguments)

    def generate(self, prompts: Prompts, output_len: int) -> int:
        from twinpilots import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        return sum(len(output.outputs[0].token_ids) for output in self._llm.generate(prompts, params, use_tqdm=False))


ENGINES = {"llama.cpp": LlamaCpp, "transformers": Transformers, "twinpilots": TwinPilots}


def prompts_of(request: Mapping[str, int]) -> list[list[int]]:
    """The token ids of a run: the same for every engine, others for every ``seed``, so that no prefix is ever cached."""
    draw = random.Random(request["seed"])
    return [draw.choices(PROMPT_IDS, k=request["input_len"]) for _ in range(request["sequences"])]


def serve(setup: Mapping[str, Any], replies: Any) -> None:
    """Load, then run what is asked for until the end of input."""

    def reply(document: Mapping[str, Any]) -> None:
        replies.write(json.dumps(document) + "\n")
        replies.flush()

    began = time.perf_counter()
    try:
        engine: Engine = ENGINES[setup["engine"]](setup)
    except Exception as error:  # noqa: BLE001  whatever a peer raises, the other end must hear of it
        reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return
    reply({"load_s": time.perf_counter() - began})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = prompts_of(request)
        began = time.perf_counter()
        generated = engine.generate(prompts, request["output_len"])
        reply({"seconds": time.perf_counter() - began, "generated": generated})


def main() -> None:
    """Keep stdout for the replies alone, also from libraries in C."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), replies)
    replies.flush()
    os._exit(0)  # a peer's threads must not keep the process


if __name__ == "__main__":
    main()
