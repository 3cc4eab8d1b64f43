"""The user's cache of converted models: a GGUF that cannot stay packed (its types, or --dtype), dequantised, kept as an ordinary Hugging Face directory.

Owns: fingerprints of files, the cache's place (``$XDG_CACHE_HOME`` or ``~/.cache``, then ``twinpilots/converted``), atomic writing. A converted model has
safetensors, config, tokenizer and chat template, and opens like any directory. Knows nothing of what the weights mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from twinpilots.errors import CheckpointError, UnsupportedModelError
from twinpilots.model.families import spec_from_config
from twinpilots.model.gguf_file import GgufFile
from twinpilots.model.gguf_tokenizer import save_tokenizer
from twinpilots.model.safetensors_file import write_safetensors
from twinpilots.model.spec import WeightDtype
from twinpilots.model.tensor_names import hf_spelling, is_small, tensor_plan
from twinpilots.model.tensors import RawTensor

logger = logging.getLogger(__name__)
SCHEMA = 1  # part of every key: a change of the conversion makes old copies unreachable
SOURCE_FIELD = "twinpilots_source_dtype"
_SAMPLES, _SAMPLE_BYTES, _HEAD_BYTES = 256, 4096, 1 << 20


class Source(Protocol):
    """What is converted: a checkpoint over the GGUF."""

    generation_config: dict[str, Any]

    def tensor(self, tensor_id: str) -> RawTensor: ...


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of the files' sizes, first bytes and evenly spread samples: milliseconds even for 100 GB, and blind to names and times."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            _sample(path, digest)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:32]


def _sample(path: Path, digest: hashlib._Hash) -> None:
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(size.to_bytes(8, "little") + stream.read(_HEAD_BYTES))
        for i in range(1, _SAMPLES + 1):
            stream.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))


def cache_root() -> Path:
    """The user's cache directory of this program."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "twinpilots"


def directory_for(path: Path) -> Path:
    """Where the converted copy of this file lies, or would lie."""
    return cache_root() / "converted" / f"{fingerprint([path])}-{SCHEMA}"


def is_complete(directory: Path) -> bool:
    """Whether a converted copy is there. (Directories appear whole: they are renamed into place.)"""
    return (directory / "config.json").is_file() and (directory / "model.safetensors").is_file()


def drop(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def write(directory: Path, gguf: GgufFile, config: Mapping[str, Any], source: Source, progress: Callable[[int, int], None] | None = None) -> bool:
    """Convert into ``directory``. False, with one warning, when the place cannot be written; the model then runs from the GGUF itself."""
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory.parent))
        _write_model(temporary, gguf, config, source, progress)
        os.replace(temporary, directory)
    except OSError as error:
        if is_complete(directory):
            return True  # another process was faster
        logger.warning("%s cannot keep a converted copy (%s); the model is converted again at every start", directory.parent, error.strerror or error)
        return False
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def _write_model(directory: Path, gguf: GgufFile, config: Mapping[str, Any], source: Source, progress: Callable[[int, int], None] | None) -> None:
    spec = spec_from_config(config, name=str(gguf.path))
    plan = tensor_plan(spec, hf_spelling(spec, ()))
    names = {tensor_id: item for tensor_id, item in plan.items() if not (spec.tied and tensor_id == "lm_head")}
    whole = {item.name: [other for other in names if names[other].name == item.name] for item in names.values()}  # fused: several of ours
    dtype: WeightDtype = spec.weight_dtype
    shapes = {name: (plan[ids[0]].shape, "fp32" if is_small(ids[0]) else dtype) for name, ids in whole.items()}
    needed = sum(gguf.tensors[name].num_elements for name in gguf.tensors) * 4  # fp32 at most
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(28, f"{needed} bytes may be needed, {free} are free")

    def convert(ids: list[str]) -> list[RawTensor]:
        return [source.tensor(tensor_id) for tensor_id in ids]

    with (directory / "model.safetensors").open("wb") as stream, ThreadPoolExecutor(_num_threads()) as pool:
        converted = _in_order(pool, convert, list(whole.values()), progress)
        write_safetensors(stream, shapes, (_stack(parts) for parts in converted))
    (directory / "config.json").write_text(json.dumps(dict(config)))
    generation = source.generation_config
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation["eos_token_ids"], "bos_token_id": generation["bos_token_id"]}))
    try:
        save_tokenizer(gguf.fields, directory, str(gguf.path))
    except UnsupportedModelError as error:
        logger.warning("%s", error)


def _stack(parts: list[RawTensor]) -> RawTensor:
    if len(parts) == 1:
        return parts[0]
    return RawTensor(data=np.concatenate([part.data for part in parts]), dtype=parts[0].dtype)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[list[str]], list[RawTensor]], items: list[list[str]], progress: Callable[[int, int], None] | None
) -> Iterator[list[RawTensor]]:
    """Results in order, with only a few items in flight, so that memory stays bounded by a few tensors."""
    pending: deque[Future[list[RawTensor]]] = deque()
    done = 0
    for item in [*items, *[None] * 2 * _num_threads()]:
        if item is not None:
            pending.append(pool.submit(work, item))
        if pending and (item is None or len(pending) > 2 * _num_threads()):
            yield pending.popleft().result()
            done += 1
            if progress is not None:
                progress(done, len(items))
    assert not pending, "every submitted item was yielded"


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
