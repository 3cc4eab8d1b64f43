"""The input file: its lines one after another, however long it is, and what one line asks for.

Owns the batch line's form and the first look over the whole file. Knows nothing of tokens, engines or outputs. Lines count from 1; blank ones are no requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twinpilots.errors import RequestError, UserError
from twinpilots.openai.fields import Fields, from_json, shown
from twinpilots.openai.requests import ApiRequest, read_request
from twinpilots.request import SamplingParams

MAX_LINE_BYTES = 64 << 20  # a longer line is an error record: memory stays bounded whatever is in the file
MAX_REMEMBERED_IDS = 1 << 22  # custom_ids that are compared with each other: eight bytes each
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part ``index`` of ``count`` (from 1): every ``count``-th line."""

    index: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """From "2/4". ValueError when it is not that."""
        first, slash, second = text.partition("/")
        if not slash or not first.isdigit() or not second.isdigit() or not 1 <= int(first) <= int(second):
            raise ValueError(f"{text!r} must be i/n with i from 1 to n, e.g. 1/4")
        return Shard(index=int(first), count=int(second))

    def has(self, line: int) -> bool:
        """Whether a line is in this part."""
        return (line - 1) % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one look over the whole file tells. ``num_requests`` are this shard's. ``duplicate``: a custom_id that comes again, and how many do."""

    sha256: str
    num_lines: int
    num_requests: int
    duplicate: str | None = None
    num_duplicates: int = 0


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request. ``request`` is what its body asks for."""

    line: int
    custom_id: str
    request: ApiRequest


def survey(path: Path, shard: Shard, *, compare_ids: bool) -> Survey:
    """Hash the file and count its requests; ``compare_ids`` also looks for custom_ids that come twice (each line is parsed for that)."""
    digest, num_lines, num_requests = hashlib.sha256(), 0, 0
    ids = array("Q")
    with open_input(path) as stream:
        for line, data in _raw_lines(stream, digest):
            num_lines = line
            if not _is_blank(data) and shard.has(line):
                num_requests += 1
                if compare_ids and len(ids) < MAX_REMEMBERED_IDS:
                    ids.append(_hash_of_id(data, line))
    values, counts = np.unique(np.frombuffer(ids, np.uint64), return_counts=True) if ids else (np.empty(0, np.uint64), np.empty(0, np.int64))
    again = values[counts > 1]
    found = Survey(sha256=digest.hexdigest(), num_lines=num_lines, num_requests=num_requests, num_duplicates=int((counts - 1).sum()))
    return found if not len(again) else replace(found, duplicate=_id_with_hash(path, shard, int(again[0])))


def requests_of(path: Path, shard: Shard) -> Iterator[tuple[int, bytes | None]]:
    """(line, its bytes) of every request of the shard; None for a line beyond `MAX_LINE_BYTES`."""
    with open_input(path) as stream:
        for line, data in _raw_lines(stream):
            if shard.has(line) and not _is_blank(data):
                yield line, data


def open_input(path: Path) -> BinaryIO:
    """The file, opened. UserError when it is none that can be read twice."""
    if not path.is_file():
        raise UserError(f"input {path} is not a file; run-batch reads it again after a restart, so it cannot be a pipe")
    return path.open("rb")


def read_custom_id(data: bytes | None) -> str | None:
    """The line's custom_id as far as it has one, however wrong the rest is."""
    try:
        value = from_json(data or b"")
    except RequestError:
        return None
    found = value.get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def read_line(line: int, data: bytes | None, defaults: SamplingParams) -> BatchLine:
    """The request in a line. RequestError says what is wrong with it."""
    if data is None:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    fields = Fields(from_json(data))
    custom_id, method, url, body = fields.text("custom_id"), fields.text("method"), fields.text("url"), fields.take("body")
    if not custom_id:
        raise RequestError("custom_id is missing; give every line one of its own", param="custom_id")
    if method not in (None, "POST"):
        raise RequestError(f"method must be 'POST', got {shown(method)}", param="method")
    if url is None:
        raise RequestError("url is missing; give /v1/completions or /v1/chat/completions", param="url")
    request = read_request(url, body, defaults)
    if request.stream:
        raise RequestError("stream is not supported in a batch; leave it out", param="stream", code="unsupported_parameter")
    return BatchLine(line=line, custom_id=custom_id, request=replace(request, warnings=request.warnings + fields.unknown()))


def _raw_lines(stream: BinaryIO, digest: Any = None) -> Iterator[tuple[int, bytes | None]]:
    """(number, bytes) of every line, blank ones too; what is read also goes into ``digest``."""
    line = 0
    while data := stream.readline(MAX_LINE_BYTES):
        line += 1
        if digest is not None:
            digest.update(data)
        whole = data.endswith(b"\n") or len(data) < MAX_LINE_BYTES
        while not data.endswith(b"\n") and len(data) == MAX_LINE_BYTES and (data := stream.readline(MAX_LINE_BYTES)):
            if digest is not None:
                digest.update(data)
        yield line, (data.removeprefix(_BOM) if line == 1 else data) if whole else None


def _is_blank(data: bytes | None) -> bool:
    return data is not None and (not data or data.isspace())


def _hash_of_id(data: bytes | None, line: int) -> int:
    """64 bits of the line's custom_id; of a line without one, bits of its own."""
    custom_id = read_custom_id(data)
    key = f"{line}" if custom_id is None else f"id {custom_id}"
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _id_with_hash(path: Path, shard: Shard, wanted: int) -> str | None:
    return next((read_custom_id(data) for line, data in requests_of(path, shard) if _hash_of_id(data, line) == wanted), None)
