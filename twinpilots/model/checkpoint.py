"""Opening a model's files: everything is validated here, before anything runs; weights are read one tensor at a time, memory-mapped.

Owns: the `Checkpoint` interface, `open_checkpoint` and the checks of a file's tensors against the spec. Tensor ids are those of `tensor_names`.
Knows nothing of devices or of how weights are packed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from twinpilots.config import Quantization
from twinpilots.errors import CheckpointError, UserError
from twinpilots.model import convert_cache
from twinpilots.model.config_reader import ConfigReader
from twinpilots.model.dummy import DummyCheckpoint, dummy_spec
from twinpilots.model.families import DTYPES, spec_from_config
from twinpilots.model.gguf_config import ROPE_FACTOR_TENSORS, config_from_gguf
from twinpilots.model.gguf_file import GgufFile
from twinpilots.model.gptq import FIELD, PackedWeights, packed_config
from twinpilots.model.locate import Located, resolve_model
from twinpilots.model.quantization import quantized_spec
from twinpilots.model.quantized import QuantizedCheckpoint, check_scales, stored_ops
from twinpilots.model.safetensors_file import FLOATS, SafetensorsFile, StoredTensor, open_shards, read_json
from twinpilots.model.spec import ModelSpec, WeightDtype
from twinpilots.model.tensor_names import TensorSource, gguf_spelling, harmless, hf_spelling, is_small, tensor_plan
from twinpilots.model.tensors import Array, RawTensor, convert
from twinpilots.model.weight_format import WeightFormat

logger = logging.getLogger(__name__)
SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
Progress = Callable[[int, int], None]


class Checkpoint(Protocol):
    """A model's weights. ``tensor`` gives linears, embedding and positions in ``spec.weight_dtype``, norms and biases in fp32, and what the spec keeps
    quantised in fp32, exactly as it is computed with; ``blocks`` gives that as row blocks (`kernels.quant_format`).

    ``generation_config``: ``eos_token_ids`` (list), ``bos_token_id`` (or None), and those of `SAMPLING_FIELDS` that the model sets.
    ``source_dtype``: the dtype of most linear weights in the file. ``fingerprint`` changes when the files' contents do (sampled), not when they are touched.
    """

    spec: ModelSpec
    generation_config: dict[str, Any]
    source_dtype: str
    fingerprint: str

    def tensor(self, tensor_id: str) -> RawTensor: ...

    def blocks(self, tensor_id: str) -> Array: ...

    def close(self) -> None: ...


class FileCheckpoint:
    """A `Checkpoint` over any reader of named tensors: the files' weights in ``spec.weight_dtype``. ``packed`` names the file's tensors that ``read_blocks``
    gives as row blocks (``read`` dequantises them); ``stored`` has the same by our ids."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        plan: Mapping[str, TensorSource],
        read: Callable[[str], RawTensor],
        close: Callable[[], None],
        generation_config: dict[str, Any],
        source_dtype: str,
        fingerprint: str,
        where: str,
        packed: Mapping[str, WeightFormat] | None = None,
        read_blocks: Callable[[str], Array] | None = None,
    ) -> None:
        self.spec = spec
        self.generation_config = generation_config
        self.source_dtype = source_dtype
        self.fingerprint = fingerprint
        self._plan, self._read, self._close, self._where = plan, read, close, where
        self._read_blocks = read_blocks
        self.stored = {tensor_id: packed[source.name] for tensor_id, source in plan.items() if source.name in packed} if packed else {}

    def values(self, tensor_id: str) -> RawTensor:
        """The tensor of our id at the precision of its file."""
        source = self._plan[tensor_id]
        raw = self._read(source.name)
        return RawTensor(data=transform(raw.data, source), dtype=raw.dtype)

    def blocks(self, tensor_id: str) -> Array:
        """Row blocks of one of ``stored``."""
        assert self._read_blocks is not None, f"{tensor_id} is not quantised in its file"
        source = self._plan[tensor_id]
        found = transform(self._read_blocks(source.name), source)
        check_scales(found, self.stored[tensor_id], f"{self._where}: tensor '{source.name}'")
        return found

    def tensor(self, tensor_id: str) -> RawTensor:
        """The tensor of our id, converted; a view of the mapped file where nothing needs converting. KeyError for an id the model has not."""
        source = self._plan[tensor_id]
        raw = convert(self.values(tensor_id), "fp32" if is_small(tensor_id) else self.spec.weight_dtype, f"{self._where}: tensor '{source.name}'")
        return RawTensor(data=raw.data - np.float32(source.subtract), dtype="fp32") if source.subtract else raw

    def close(self) -> None:
        self._close()


def open_checkpoint(
    model: str | Path | Located, *, dtype: str = "auto", quantization: Quantization | None = None, keep: Sequence[str] = (), strict: bool = False,
    revision: str | None = None, progress: Progress | None = None,
) -> Checkpoint:  # fmt: skip
    """Find, validate and open a model (see `resolve_model`). Nothing is computed before all of its tensors have been checked.

    ``dtype``: "auto" keeps weights as stored, quantised ones too where we have their format (others become fp16); fp32, bf16 or fp16 converts.
    ``quantization`` and ``keep`` are `quantization.quantized_spec`'s; weights are quantised when they are first asked for. ``strict`` makes unexpected
    tensors an error. ``progress(done, total)`` is called while a GGUF is converted for the first time.
    """
    located = model if isinstance(model, Located) else resolve_model(model, revision)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, fp32, bf16 or fp16, got {dtype!r}")
    wanted = None if dtype == "auto" else DTYPES[dtype]
    if located.kind == "dummy":
        return DummyCheckpoint(quantized_spec(dummy_spec(located.name, wanted), {}, quantization, keep))
    if located.kind == "directory":
        files = _open_directory(located.files, located.name, wanted, strict)
    else:
        files = _open_gguf(located, wanted, strict, progress)
    try:
        stored = stored_ops(files.spec, files.stored) if wanted is None else {}
        spec = quantized_spec(files.spec, stored, quantization, keep)
    except UserError:
        files.close()
        raise
    return files if spec == files.spec else QuantizedCheckpoint(files, spec)


def transform(data: Array, source: TensorSource) -> Array:
    """Cut the source's rows (values or blocks) out and undo llama-arch GGUF's permutation of rotary halves."""
    data = data if source.rows is None else data[source.rows[0] : source.rows[1]]
    return unpermute(data, source.unpermute_heads) if source.unpermute_heads else data


def unpermute(data: Array, heads: int) -> Array:
    """Rows of each head from interleaved pairs (0, d/2, 1, d/2 + 1, ...) back to halves. ``data``: [heads * head_dim, ...]."""
    pairs = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)


def parse_generation_config(raw: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """EOS ids (one, a list, or none), BOS id and sampling defaults; generation_config.json before config.json."""
    merged = {key: config.get(key) for key in ("eos_token_id", "bos_token_id")} | {k: v for k, v in raw.items() if v is not None}
    eos = merged.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: field 'eos_token_id' is {str(eos)[:60]}; it must be a token id or a list of them")
    reader = ConfigReader(merged, where)
    result: dict[str, Any] = {"eos_token_ids": list(ids), "bos_token_id": reader.optional_integer("bos_token_id", low=0)}
    for name in SAMPLING_FIELDS:
        value = raw.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
                raise CheckpointError(f"{where}: field '{name}' is {str(value)[:60]}; it must be a number of 0 or more")
            result[name] = value
    return result


def check_tensors(
    spec: ModelSpec, plan: Mapping[str, TensorSource], stored: Mapping[str, StoredTensor], expected: Callable[[str], bool], where: str, strict: bool
) -> None:
    """Every planned tensor is there in its shape; tensors that nothing uses are reported (``strict``: refused)."""
    for source in plan.values():
        found = stored.get(source.name)
        if found is None:
            raise CheckpointError(f"{where}: tensor '{source.name}' is missing (shape {list(source.shape)} expected from the config)")
        if found.shape != source.shape:
            raise CheckpointError(f"{where}: tensor '{source.name}' has shape {list(found.shape)}, the config says {list(source.shape)}")
    used = {source.name for source in plan.values()}
    unused = sorted(name for name in stored if name not in used and not expected(name))
    if unused:
        message = f"{where}: {len(unused)} tensor(s) are not used by {spec.family}: {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
        if strict:
            raise CheckpointError(f"{message}; load without strict to ignore them")
        logger.warning("%s; ignored", message)


def majority(plan: Mapping[str, TensorSource], dtypes: Mapping[str, str]) -> str:
    """The dtype that most linear weights of the file have, by elements."""
    elements: Counter[str] = Counter()
    for tensor_id, source in plan.items():
        if not is_small(tensor_id):
            elements[dtypes[source.name]] += int(np.prod(source.shape))
    return elements.most_common(1)[0][0]


def _open_directory(path: Path, name: str, wanted: WeightDtype | None, strict: bool) -> FileCheckpoint:
    config_path = path / "config.json"
    if not config_path.exists():
        raise CheckpointError(f"{path}: config.json is missing; is this a model directory?")
    config = read_json(config_path)
    quantized = packed_config(config, str(path))
    config.pop(FIELD, None)
    spec = spec_from_config(config, name=name, dtype=wanted)
    owners = open_shards(path)
    packed = None if quantized is None else PackedWeights(quantized, owners, str(path))
    spelling = hf_spelling(spec, owners)
    plan = tensor_plan(spec, spelling)
    stored = {tensor: file.tensors[tensor] for tensor, file in owners.items()} if packed is None else packed.stored()
    check_tensors(spec, plan, stored, lambda tensor: harmless(spec, spelling, tensor), str(path), strict)
    formats = {} if packed is None else packed.formats
    dtypes = {source.name: _float_dtype(path, source.name, stored[source.name]) for source in plan.values() if source.name not in formats}
    source_dtype = majority({tensor_id: source for tensor_id, source in plan.items() if source.name in dtypes}, dtypes)
    if wanted is None and source_dtype != spec.weight_dtype:
        spec = spec_from_config(config, name=name, dtype=source_dtype)
    generation = path / "generation_config.json"
    shards = sorted({file.path for file in owners.values()})
    return FileCheckpoint(
        spec=spec,
        plan=plan,
        read=(lambda tensor: owners[tensor].read(tensor)) if packed is None else packed.read,
        close=lambda: _close_all(owners.values()),
        generation_config=parse_generation_config(read_json(generation) if generation.exists() else {}, _flat(config), str(path)),
        source_dtype=quantized.method if quantized else str(config.get(convert_cache.SOURCE_FIELD, source_dtype)),
        fingerprint=convert_cache.fingerprint([config_path, *shards]),
        where=str(path),
        packed=formats,
        read_blocks=None if packed is None else packed.blocks,
    )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the fields of a nested ``text_config`` on top."""
    return config | {key: value for key, value in (config.get("text_config") or {}).items() if value is not None}


def _close_all(files: Iterable[SafetensorsFile]) -> None:
    for file in files:
        file.close()


def _float_dtype(path: Path, name: str, stored: StoredTensor) -> WeightDtype:
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {stored.dtype}; only F32, F16 and BF16 weights are supported")
    return FLOATS[stored.dtype]


def _open_gguf(located: Located, wanted: WeightDtype | None, strict: bool, progress: Progress | None) -> FileCheckpoint:
    path = located.files
    if wanted is None:
        packed, _, _ = _check_gguf(GgufFile(path), located.name, None, strict)
        if packed.stored:
            return packed
        packed.close()
    directory = convert_cache.directory_for(path)
    if not strict and convert_cache.is_complete(directory):
        try:
            return _open_directory(directory, located.name, wanted, strict)
        except CheckpointError as error:
            logger.warning("the converted copy of %s is damaged and is made again (%s)", path, error)
            convert_cache.drop(directory)
    gguf = GgufFile(path)
    checkpoint, config, quantized = _check_gguf(gguf, located.name, None, strict)
    if quantized and (convert_cache.is_complete(directory) or convert_cache.write(directory, gguf, config, checkpoint, progress)):
        gguf.close()
        return _open_directory(directory, located.name, wanted, strict)
    return checkpoint if wanted is None else _check_gguf(gguf, located.name, wanted, strict)[0]


def _check_gguf(gguf: GgufFile, name: str, wanted: WeightDtype | None, strict: bool) -> tuple[FileCheckpoint, dict[str, Any], bool]:
    """The validated checkpoint over the GGUF itself, the config.json that describes it, and whether it is quantised."""
    where = str(gguf.path)
    factors = {tensor: gguf.read(tensor).float32().ravel().tolist() for tensor in ROPE_FACTOR_TENSORS if tensor in gguf.tensors}
    config = config_from_gguf(gguf.fields, name=where, tensors=gguf.tensors, rope_factors=factors)
    spec = spec_from_config(config, name=name, dtype=wanted or "fp16")
    spelling = gguf_spelling(spec)
    plan = tensor_plan(spec, spelling, "gguf")
    check_tensors(spec, plan, gguf.tensors, lambda tensor: harmless(spec, spelling, tensor), where, strict)
    source_dtype = majority(plan, {source.name: gguf.source_dtype(source.name) for source in plan.values()})
    quantized = any(gguf.is_quantized(source.name) for source in plan.values())
    config["dtype"] = "fp16" if source_dtype not in DTYPES else source_dtype
    config[convert_cache.SOURCE_FIELD] = source_dtype
    checkpoint = FileCheckpoint(
        spec=spec_from_config(config, name=name, dtype=wanted),
        plan=plan,
        read=gguf.read,
        close=gguf.close,
        generation_config=gguf_generation_config(gguf),
        source_dtype=source_dtype,
        fingerprint=convert_cache.fingerprint([gguf.path]),
        where=where,
        packed={name: chosen for name in gguf.tensors if (chosen := gguf.packed_format(name)) is not None},
        read_blocks=gguf.blocks,
    )
    return checkpoint, config, quantized


def gguf_generation_config(gguf: GgufFile) -> dict[str, Any]:
    """EOS and BOS of GGUF metadata; end of turn and end of message stop generation, too."""
    reader = ConfigReader(gguf.fields, str(gguf.path))
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [reader.optional_integer(f"tokenizer.ggml.{key}", low=0) for key in keys]
    return {
        "eos_token_ids": list(dict.fromkeys(i for i in ids if i is not None)),
        "bos_token_id": reader.optional_integer("tokenizer.ggml.bos_token_id", low=0),
    }
