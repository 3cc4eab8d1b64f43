"""`twinpilots generate`: text for prompts from the command line or a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinpilots.commands import options
from twinpilots.errors import UserError

if TYPE_CHECKING:
    from twinpilots.api import LLM
    from twinpilots.request import RequestOutput, SamplingParams

Prompt = str | list[int]


def register(subparsers: Any) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("generate", help="generate text for prompts", description="Generate text for prompts.", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    group.add_argument("--prompts-file", metavar="FILE", help='one prompt per line, or JSON lines with {"prompt": text or token ids}; - is stdin')
    group.add_argument("--chat-template", action="store_true", help="each prompt is the user's message of a conversation")
    group.add_argument("--logprobs", type=options.non_negative_int, metavar="N", help="report the log probabilities of the N likeliest tokens")
    options.add_sampling_flags(parser, max_tokens=16)
    options.add_trace_flags(parser)
    options.add_llm_flags(parser)
    options.add_output_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Print the texts, or return the document of ``--json``."""
    prompts = read_prompts(args.prompt, args.prompts_file)
    if args.chat_template and any(not isinstance(prompt, str) for prompt in prompts):
        raise UserError("--chat-template needs text prompts; token ids are used as they are")
    with options.open_llm(args) as llm:
        params = options.sampling_params(args, llm, logprobs=args.logprobs)
        outputs: list[RequestOutput] = []
        with llm.trace(args.trace, num_passes=args.trace_passes) if args.trace is not None else nullcontext():
            if len(prompts) == 1 and not args.json:
                _print_stream(llm, prompts[0], params, chat=args.chat_template)
            else:
                outputs = _generate(llm, prompts, params, chat=args.chat_template)
        stats = llm.stats()
    if args.json:
        return document(args.model, prompts, outputs, stats)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=False), 1):
        print(f"--- {number}: {prompt}\n{output.outputs[0].text}")
    sys.stdout.flush()
    print(summary(stats), file=sys.stderr)
    return None


def summary(stats: Mapping[str, Any]) -> str:
    """What the run took: measured beside predicted, in all and for every resource."""
    rates, tokens, emulated = stats["tokens_per_s"], stats["tokens"], ", an emulated GPU" if stats["emulated"] else ""
    measured, predicted = (f"{rates[name]:.4g}" if rates[name] is not None else "-" for name in ("measured", "predicted"))
    resources = (("cpu", "CPU"), ("gpu", "GPU"), ("link", "link"))
    busy = [f"{name} {stats['busy_s'][key]:.3g} s (predicted {stats['predicted_busy_s'][key]:.3g})" for key, name in resources]
    return (
        f"{tokens['prompt']} + {tokens['generated']} tokens in {stats['seconds']:.3g} s on {stats['device']}{emulated}: "
        f"{measured} tokens/s (predicted {predicted})\nbusy: {', '.join(busy)}; plan changes: {stats['plan_changes']}"
    )


def read_prompts(given: Sequence[str], file: str | None) -> list[Prompt]:
    """The prompts of --prompt, then those of --prompts-file. Raises UserError that names an empty, missing or malformed one."""
    prompts: list[Prompt] = list(given)
    for number, text in enumerate(given, 1):
        if not text:
            raise UserError(f"--prompt number {number} is empty; give it some text")
    if file is not None:
        prompts += parse_prompts(_read(file), "stdin" if file == "-" else file)
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT or --prompts-file FILE")
    return prompts


def parse_prompts(text: str, name: str) -> list[Prompt]:
    """One prompt per non-blank line; JSON lines when the file is called so or its first line is an object with "prompt"."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name} holds no prompt; write one per line")
    if name.endswith(".jsonl") or _is_prompt_object(lines[0][1]):
        return [_prompt_of(line, f"{name}:{number}") for number, line in lines]
    return [line for _, line in lines]


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _is_prompt_object(line: str) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and "prompt" in value


def _prompt_of(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error}); every line must be an object with a prompt") from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in prompt):
        return prompt
    raise UserError(f'{place} needs {{"prompt": ...}} with non-empty text or a list of token ids')


def _generate(llm: LLM, prompts: list[Prompt], params: SamplingParams, *, chat: bool) -> list[RequestOutput]:
    with options.arguments_are_the_users():
        if chat:
            return llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params)
        return llm.generate(prompts, params)


def _print_stream(llm: LLM, prompt: Prompt, params: SamplingParams, *, chat: bool) -> None:
    shown = 0
    outputs = llm.stream_chat([{"role": "user", "content": prompt}], params) if chat else llm.stream(prompt, params)
    for output in options.started(outputs):
        text = output.outputs[0].text
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()


def document(model: str, prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], stats: dict[str, Any]) -> dict[str, Any]:
    """The JSON form of the result (docs/cli.md, schema 1)."""
    rows = []
    for prompt, output in zip(prompts, outputs, strict=True):
        best = output.outputs[0]
        rows.append(
            {
                "prompt": prompt,
                "text": best.text,
                "token_ids": list(best.token_ids),
                "finish_reason": best.finish_reason,
                "logprobs": None if best.logprobs is None else [_logprobs(step) for step in best.logprobs],
            }
        )
    return {"schema": 1, "model": model, "outputs": rows, "stats": stats}


def _logprobs(step: Any) -> dict[str, dict[str, Any]]:
    return {str(token): {"logprob": float(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token} for token, entry in step.items()}
