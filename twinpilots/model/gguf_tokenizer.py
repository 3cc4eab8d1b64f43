"""A tokenizer from GGUF metadata, built with the `tokenizers` package: byte-level BPE ("gpt2") and SentencePiece-style BPE ("llama").

Owns: `build_tokenizer`, `save_tokenizer` (as tokenizer.json + tokenizer_config.json), and the table of pre-tokenizers, after llama.cpp's llama-vocab.cpp.
Knows nothing of files' weights or of chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twinpilots.errors import CheckpointError, UnsupportedModelError
from twinpilots.model.config_reader import ConfigReader

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = [r"\p{N}", _GPT2]
# tokenizer.ggml.pre -> regexes, applied one after the other; each match is a piece of its own
PRE_TOKENIZERS: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2], "mpt": [_GPT2], "olmo": [_GPT2], "jais": [_GPT2], "phi-2": [_GPT2],
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS,
    "llama-bpe": [_LLAMA3], "llama3": [_LLAMA3], "llama-v3": [_LLAMA3], "smaug-bpe": [_LLAMA3], "dbrx": [_LLAMA3],
    "qwen2": [_QWEN2], "deepseek-r1-qwen": [_QWEN2], "stablelm2": [_QWEN2],
}  # fmt: skip
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_CONTROL, _USER, _BYTE = 3, 4, 6
_SPACE = "\u2581"


def build_tokenizer(fields: Mapping[str, Any], where: str) -> Any:
    """The `tokenizers.Tokenizer` that the metadata describes. UnsupportedModelError for kinds that we cannot build, CheckpointError for bad lists."""
    reader = ConfigReader(fields, where)
    kind = reader.text("tokenizer.ggml.model")
    tokens = _texts(reader, "tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: field 'tokenizer.ggml.tokens' has duplicates")
    if kind == "gpt2":
        tokenizer = _byte_level(reader, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(reader, tokens)
    else:
        raise UnsupportedModelError(f"{where}: tokenizer '{kind}' is not supported (gpt2 and llama are); pass --tokenizer with a directory that has one")
    _add_special(tokenizer, reader, tokens, normalized=kind == "llama" and not _space_prefix(reader))
    _add_bos(tokenizer, reader, tokens)
    return tokenizer


def save_tokenizer(fields: Mapping[str, Any], directory: Path, where: str) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included."""
    if "tokenizer.ggml.model" not in fields:
        return
    build_tokenizer(fields, where).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(fields, where)))


def tokenizer_config(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tokenizer_config.json of the metadata: BOS, EOS, whether BOS is added, chat template."""
    reader = ConfigReader(fields, where)
    tokens = _texts(reader, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for name in ("bos", "eos"):
        token_id = reader.optional_integer(f"tokenizer.ggml.{name}_token_id", low=0, high=len(tokens) - 1)
        config[f"{name}_token"] = None if token_id is None else tokens[token_id]
    config["add_bos_token"] = _adds_bos(reader)
    if fields.get("tokenizer.chat_template") is not None:
        config["chat_template"] = reader.text("tokenizer.chat_template")
    return config


def _texts(reader: ConfigReader, key: str) -> list[str]:
    value = reader.values.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise reader.error(key, "a list of texts")
    return value


def _byte_level(reader: ConfigReader, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = reader.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(f"{reader.where}: pre-tokenizer '{name}' is not supported; pass --tokenizer with a directory that has a tokenizer.json")
    halves = [merge.partition(" ") for merge in _texts(reader, "tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in halves]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=name in _LLAMA3_NAMES)
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"{reader.where}: field 'tokenizer.ggml.merges' does not fit the vocabulary: {str(error)[:120]}") from error
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader: ConfigReader, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = reader.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise reader.error("tokenizer.ggml.scores", f"a list of {len(tokens)} numbers")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = reader.integer("tokenizer.ggml.unknown_token_id", 0, low=0, high=len(tokens) - 1)
    merges = merges_from_scores(vocab, scores, skip=_special_ids(reader, tokens))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _space_prefix(reader):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def merges_from_scores(vocab: Mapping[str, int], scores: list[float], skip: set[int]) -> list[tuple[str, str]]:
    """SentencePiece's merges: every way to join two known pieces into a known piece, best score first, then longer left and right halves first, then in the
    vocabulary's order (as transformers rebuilds them)."""
    pieces, cuts = list[str](), list[int]()
    prefixes = list[str]()  # known pieces that the one before begins with: in sorted order, all of the next one's are among them
    for piece in sorted(filter(None, vocab)):
        while prefixes and not piece.startswith(prefixes[-1]):
            prefixes.pop()
        if vocab[piece] not in skip:
            found = [len(left) for left in prefixes if piece[len(left) :] in vocab]
            pieces += [piece] * len(found)
            cuts += found
        prefixes.append(piece)
    ids = np.array([vocab[piece] for piece in pieces], np.int64)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    order = np.lexsort((ids, -lengths, -np.array(cuts, np.int64), -np.array(scores)[ids]))
    return [(pieces[i][: cuts[i]], pieces[i][cuts[i] :]) for i in order.tolist()]


def _special_ids(reader: ConfigReader, tokens: list[str]) -> set[int]:
    types = reader.values.get("tokenizer.ggml.token_type") or []
    return {i for i, kind in enumerate(types[: len(tokens)]) if kind in (_CONTROL, _BYTE)}


def _add_special(tokenizer: Any, reader: ConfigReader, tokens: list[str], normalized: bool) -> None:
    """Control tokens are special (hidden in text), user-defined ones are matched before anything else but stay text."""
    from tokenizers import AddedToken

    types = reader.values.get("tokenizer.ggml.token_type") or []
    if not isinstance(types, list) or len(types) not in (0, len(tokens)):
        raise reader.error("tokenizer.ggml.token_type", f"a list of {len(tokens)} integers")
    pairs = list(zip(tokens, types, strict=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in pairs if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=normalized, special=False) for token, kind in pairs if kind == _USER])


def _adds_bos(reader: ConfigReader) -> bool:
    default = reader.text("tokenizer.ggml.model") == "llama" or reader.text("tokenizer.ggml.pre", "default") in _LLAMA3_NAMES
    return reader.flag("tokenizer.ggml.add_bos_token", default) and reader.values.get("tokenizer.ggml.bos_token_id") is not None


def _space_prefix(reader: ConfigReader) -> bool:
    return reader.flag("tokenizer.ggml.add_space_prefix", True)


def _add_bos(tokenizer: Any, reader: ConfigReader, tokens: list[str]) -> None:
    """The post-processor that puts BOS in front, when the model wants it."""
    from tokenizers import processors

    if _adds_bos(reader):
        token_id = reader.integer("tokenizer.ggml.bos_token_id", low=0, high=len(tokens) - 1)
        bos = tokens[token_id]
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, token_id)])
