"""program.py and kernels/native/abi.h say the same: constants, enumerations, and the fields of every record in order and type."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from twinpilots.kernels import abi as program

HEADER = re.sub(r"//.*", "", (Path(program.__file__).parents[1] / "kernels" / "native" / "abi.h").read_text())
CONSTANTS = {name: int(value) for name, value in re.findall(r"constexpr \w+ (\w+) = (-?\d+);", HEADER)}
C_TYPES = {"int32_t": "<i4", "uint32_t": "<u4", "int64_t": "<i8", "double": "<f8", "Entry": program.ENTRY, "Mailbox": program.MAILBOX}


def number(text: str) -> int:
    return int(eval(text, {"__builtins__": {}}, CONSTANTS))


def enumerators(name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} : int32_t \{{(.*?)\}};", HEADER, re.S)
    assert body, f"abi.h has no enum {name}"
    return {key: number(value) for key, value in re.findall(r"(\w+) = ([^,}]+)", body[1])}


def record(name: str) -> np.dtype:
    body = re.search(rf"struct {name} \{{(.*?)\}};", HEADER, re.S)
    assert body, f"abi.h has no struct {name}"
    fields = re.findall(r"(\w+) (\w+)(?:\[(\w+)\])?;", body[1])
    return np.dtype([(field, C_TYPES[kind], (number(count),)) if count else (field, C_TYPES[kind]) for kind, field, count in fields])


@pytest.mark.parametrize(
    "enum",
    [program.Op, program.Space, program.Dtype, program.Activations, program.Epilogue, program.Act, program.NormKind, program.Meta],
    ids=lambda e: e.__name__,
)
def test_enumerations_agree(enum: type[IntEnum]) -> None:
    assert enumerators(enum.__name__) == {member.name: int(member) for member in enum}


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("Insn", program.INSN),
        ("Entry", program.ENTRY),
        ("Mailbox", program.MAILBOX),
        ("Control", program.CONTROL),
        ("Chain", program.CHAIN),
        ("Choice", program.CHOICE),
    ],
)
def test_records_agree(name: str, dtype: np.dtype) -> None:
    assert record(name) == dtype


def test_constants_agree() -> None:
    names = ("ABI_VERSION", "MAX_WAITS", "NUM_ARGS", "MAX_MICRO_BATCHES", "MAILBOX_ENTRIES", "EVENTS_OFFSET")
    assert {name: CONSTANTS[name] for name in names} == {name: getattr(program, name) for name in names}
    assert CONSTANTS["NULL_ADDRESS"] == program.NULL
    assert int(re.search(r"double f\[(\d+)\]", HEADER)[1]) == program.NUM_FLOATS  # type: ignore[index]
