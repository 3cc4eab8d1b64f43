"""From what a user calls a model to where its files are: a directory, a .gguf file, a packaged model's name, `dummy:NAME`, a Hugging Face hub id.

Owns: `resolve_model`. Knows nothing of the files' contents.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twinpilots.errors import UserError
from twinpilots.model.packaged import PACKAGED, packaged_file
from twinpilots.model.safetensors_file import read_json

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
_UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A model that was found: ``path`` is its directory or .gguf file (None for a dummy), ``name`` what to call it in reports."""

    kind: Literal["directory", "gguf", "dummy"]
    name: str
    path: Path | None = None

    @property
    def files(self) -> Path:
        """The path of a model that has files."""
        assert self.path is not None, f"{self.name} has no files"
        return self.path


def resolve_model(text: str | Path, revision: str | None = None) -> Located:
    """Find the model; download it from the hub when it is not in the cache. Raises UserError with what to do next.

    ``revision`` is a hub branch, tag or commit; it is refused for anything that is not on the hub.
    """
    text = str(text)
    found = _resolve_local(text)
    if found is None:
        return _resolve_hub(text, revision)
    if revision is not None:
        raise UserError(f"revision '{revision}' was given, but {text} is not a Hugging Face hub id")
    return found


def resolve_tokenizer(text: str, revision: str | None = None) -> Located:
    """Find a tokenizer: a directory, a tokenizer.json, anything `resolve_model` knows, or a hub id, of which only the tokenizer is downloaded."""
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".json":
        return Located(kind="directory", name=path.name, path=path)
    found = _resolve_local(text)
    if found is not None:
        return found
    return Located(kind="directory", name=text, path=_download(text, revision, [pattern for pattern in _WANTED if "safetensors" not in pattern]))


def _resolve_local(text: str) -> Located | None:
    if not text.strip():
        raise UserError(f"no model was given; pass a directory, a .gguf file, {', '.join(PACKAGED)}, dummy:NAME or a Hugging Face hub id")
    if text.startswith("dummy:"):
        return Located(kind="dummy", name=text)
    if text in PACKAGED:
        return Located(kind="gguf", name=text, path=packaged_file(text))
    path = Path(text).expanduser()
    if path.is_dir():
        return Located(kind="directory", name=path.resolve().name, path=path)
    if path.is_file():
        if path.suffix == ".gguf":
            return Located(kind="gguf", name=path.stem, path=path)
        raise UserError(f"{text} is a file but not a .gguf; give the directory that holds config.json and the safetensors files")
    if path.suffix in (".gguf", ".safetensors") or not _HUB_ID.fullmatch(text):
        raise UserError(f"model {text} was not found: no such file or directory")
    return None


def _resolve_hub(repo: str, revision: str | None) -> Located:
    """The snapshot in the hub's cache when it is complete, else a download. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as everywhere."""
    cached = _cached(repo, revision)
    if cached is None or not _is_complete(cached):
        cached = _download(repo, revision, _WANTED)
    return Located(kind="directory", name=repo, path=cached)


def _cached(repo: str, revision: str | None) -> Path | None:
    hub = _hub(repo)
    try:
        return Path(hub.snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except hub.errors.LocalEntryNotFoundError:
        return None
    except Exception as error:  # the client's errors have no common base
        raise _hub_error(repo, error) from error


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(_hub(repo).snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED))
    except UserError:
        raise
    except Exception as error:  # HTTP, offline, gated, disk: no common base
        raise _hub_error(repo, error) from error


def _hub(repo: str) -> Any:
    try:
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"model {repo} was not found here, and Hugging Face hub ids need: pip install 'twinpilots[hub]'") from error


def _hub_error(repo: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(
        f"model {repo} is neither a file or directory here nor in the Hugging Face cache, and cannot be downloaded ({type(error).__name__}: {reason}); "
        "check the name, the connection, HF_TOKEN for gated models, and HF_HUB_OFFLINE"
    )


def _is_complete(path: Path) -> bool:
    """Whether a cached snapshot has its config and every shard."""
    if not (path / "config.json").exists():
        return False
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return any(path.glob("*.safetensors"))
    shards = read_json(index).get("weight_map")
    return isinstance(shards, dict) and all((path / str(shard)).exists() for shard in shards.values())
