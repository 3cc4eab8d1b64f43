"""Text to token ids and back: tokenizer.json or GGUF metadata, chat templates, streaming-safe decoding.

Owns: `Tokenizer`, `Detokenizer`, `load_tokenizer`. Knows nothing of models or sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinpilots.errors import CheckpointError, UserError
from twinpilots.model import convert_cache
from twinpilots.model.chat_template import ChatTemplate, Message
from twinpilots.model.checkpoint import Checkpoint
from twinpilots.model.gguf_file import GgufFile
from twinpilots.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from twinpilots.model.locate import Located, resolve_tokenizer
from twinpilots.model.safetensors_file import read_json

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # tokens re-decoded with each new one: enough for any space or byte rule of a decoder
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")


class Tokenizer:
    """A tokenizer with its special tokens and chat template. ``backend`` is a `tokenizers.Tokenizer`."""

    def __init__(self, backend: Any, config: Mapping[str, Any], where: str) -> None:
        self.backend = backend
        self.special_tokens = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name) is not None}
        self.bos_token_id: int | None = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_token_ids: list[int] = [] if eos is None else [eos]
        self._add_bos = config.get("add_bos_token")
        self._where = where
        self._templates = _template_sources(config.get("chat_template"), where)
        self._compiled: dict[str, ChatTemplate] = {}

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def state(self) -> bytes:
        """Everything that makes texts into ids and back, as bytes: two tokenizers with the same state do the same."""
        return repr((self.backend.to_str(), self.special_tokens, self.eos_token_ids, self._add_bos, self._templates)).encode("utf-8", "surrogatepass")

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of ``text``. ``add_special`` puts BOS in front where the model wants it, unless the text already begins with it."""
        ids = list(self.backend.encode(text, add_special_tokens=add_special).ids)
        bos = self.bos_token_id
        if not add_special or bos is None:
            return ids
        written = text.startswith(self.special_tokens["bos_token"])
        count = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        if self._add_bos is False and count and not written:
            return ids[count:]
        if self._add_bos and not count:
            return [bos, *ids]
        return ids[1:] if written and count > 1 else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; ids beyond the vocabulary (padding rows of the embedding) are empty."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one token ("" beyond the vocabulary)."""
        return self.backend.id_to_token(token_id) or ""

    @property
    def supports_tools(self) -> bool:
        """Whether the chat template does anything with tools."""
        return "tool_use" in self._templates or "tools" in self._templates.get("default", "")

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt's text for a conversation. Raises UserError when the model has no template or the template refuses."""
        source = (self._templates.get("tool_use") if tools else None) or self._templates.get("default")
        if source is None:
            raise UserError(f"{self._where}: the model has no chat template; pass plain prompts, or another --tokenizer")
        template = self._compiled.get(source)
        if template is None:  # compiling takes longer than rendering
            template = self._compiled[source] = ChatTemplate(source, self.special_tokens, self._where)
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, options=options)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of `apply_chat_template`'s text; the template writes its own special tokens, none are added."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, tools, options), add_special=False)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found = None if token is None else self.backend.token_to_id(token)
        return None if found is None else int(found)


class Detokenizer:
    """Text of a growing sequence, piece by piece: a character that spans tokens comes out once it is whole.

    ``prompt_ids`` give the decoder its context, so that a first word keeps its leading space. Pieces concatenate to the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._start = 0  # the context that is decoded again each time
        self._read = len(self._ids)  # tokens whose text has been given out

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete ("" while a character is unfinished)."""
        self._ids.extend(ids)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left when the sequence ends, with U+FFFD for an unfinished character."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._start, self._read)
        whole = self._decode(self._start, len(self._ids))
        if len(whole) <= len(before) or (whole.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._read = max(self._start, self._read - CONTEXT_TOKENS), len(self._ids)
        return whole[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], self._skip)


def load_tokenizer(located: Located, checkpoint: Checkpoint | None = None, override: str | Path | None = None, revision: str | None = None) -> Tokenizer | None:
    """The model's tokenizer, or that of ``override`` (a directory, a tokenizer.json, a .gguf file, a hub id). None when the model brings none.

    With ``checkpoint``, its EOS ids join the tokenizer's, and an override with more tokens than the model is a UserError.
    """
    source = located if override is None else resolve_tokenizer(str(override), revision)
    tokenizer = None if source.kind == "dummy" else _load(source.files, source.kind)
    if tokenizer is None:
        if override is not None:
            raise UserError(f"{override}: no tokenizer found; give a directory, a tokenizer.json or a .gguf file that has one")
        return None
    if checkpoint is not None:
        tokenizer.eos_token_ids = list(dict.fromkeys([*checkpoint.generation_config["eos_token_ids"], *tokenizer.eos_token_ids]))
        if override is not None and tokenizer.vocab_size > checkpoint.spec.vocab_size:
            raise UserError(f"tokenizer {override} has {tokenizer.vocab_size} tokens, model {located.name} only {checkpoint.spec.vocab_size}")
    return tokenizer


def _load(path: Path, kind: str) -> Tokenizer | None:
    if kind == "gguf":
        return _from_gguf(path)
    return _from_json(path, path.parent) if path.is_file() else _from_directory(path)


def _from_gguf(path: Path) -> Tokenizer | None:
    """From the converted copy when there is one (fast), else from the metadata."""
    directory = convert_cache.directory_for(path)
    if (directory / "tokenizer.json").is_file():
        return _from_directory(directory)
    gguf = GgufFile(path)
    if "tokenizer.ggml.model" not in gguf.fields:
        return None
    return Tokenizer(build_tokenizer(gguf.fields, str(path)), tokenizer_config(gguf.fields, str(path)), str(path))


def _from_directory(directory: Path) -> Tokenizer | None:
    if (directory / "tokenizer.json").is_file():
        return _from_json(directory / "tokenizer.json", directory)
    slow = next((name for name in _SLOW_FILES if (directory / name).is_file()), None)
    return None if slow is None else _from_transformers(directory, slow)


def _from_json(path: Path, directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer: {str(error)[:160]}") from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, _directory_config(directory), str(directory))


def _from_transformers(directory: Path, slow: str) -> Tokenizer:
    message = f"{directory}: it has {slow} but no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{message}; install transformers and sentencepiece to read it, or pass --tokenizer") from error
    try:
        backend = AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except Exception as error:  # whatever its converters raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{message}, and transformers cannot convert it ({reason}); pass --tokenizer with a directory that has a tokenizer.json") from error
    return Tokenizer(backend, _directory_config(directory), str(directory))


def _directory_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json and the chat template's own files."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= {key: value for key, value in read_json(directory / name).items() if value is not None}
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    elif (directory / "chat_template.json").is_file():
        config["chat_template"] = read_json(directory / "chat_template.json").get("chat_template")
    return config


def _template_sources(value: Any, where: str) -> dict[str, str]:
    """Templates by name: one text is "default"; older configs list {name, template} objects."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in value):
        return {str(item["name"]): str(item["template"]) for item in value}
    raise CheckpointError(f"{where}: field 'chat_template' is {json.dumps(value)[:60]}; it must be a text or a list of named templates")


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)
