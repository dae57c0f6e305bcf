"""A safetensors file read piece by piece: first its table of tensors, then single tensors.

Reads with plain file reads instead of a memory map, so that a file that somebody truncates under a running server is
a refused adapter and not a bus error.
"""

import json
import math
import os
from dataclasses import dataclass
from io import BufferedIOBase
from typing import TypeGuard

import ml_dtypes
import numpy as np

from slora_jax.errors import BadAdapter, shown

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that are read, by their name in the file."""

# Parsing holds the interpreter's lock: so much takes at most some 15 ms. The table of the largest Llama's adapter takes
# 270 kB.
MAX_TABLE_BYTES = 512 * 2**10
_MAX_DIMS = 8
_LENGTH_BYTES = 8
_REMEDY = "save or copy the adapter again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: ``num_bytes`` from byte ``start`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_table(file: BufferedIOBase) -> tuple[bytes, int]:
    """Reads the table of tensors, unparsed, and the size of the file.

    Raises:
      BadAdapter: the file is truncated, or no safetensors file.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise BadAdapter(f"the file has {file_bytes} bytes, too few for a safetensors file; {_REMEDY}")
    length = int.from_bytes(prefix, "little")
    if length > file_bytes - _LENGTH_BYTES:
        raise BadAdapter(
            f"truncated or not a safetensors file: its table should take {length} bytes, "
            f"but {file_bytes - _LENGTH_BYTES} follow; {_REMEDY}"
        )
    if length > MAX_TABLE_BYTES:
        raise BadAdapter(f"its table of tensors takes {length} bytes, more than the {MAX_TABLE_BYTES} allowed")
    return file.read(length), file_bytes


def parse_table(table: bytes, file_bytes: int) -> list[TensorEntry]:
    """Parses the table and checks that its tensors fill the rest of the file exactly.

    Returns:
      The tensors in the order of their bytes.

    Raises:
      BadAdapter: the table is corrupt, or names an unsupported element type.
    """
    try:
        fields = json.loads(table.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:
        reason = str(e) if isinstance(e, _NamedTwice) else "is not valid JSON"
        raise BadAdapter(f"corrupt: its table of tensors {reason}; {_REMEDY}") from None
    if not isinstance(fields, dict):
        raise BadAdapter(f"corrupt: its table of tensors is not a JSON object; {_REMEDY}")
    end = _LENGTH_BYTES + len(table)
    entries = [_entry(name, value, end) for name, value in fields.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    for entry in entries:
        if entry.start != end:
            raise BadAdapter(
                f"corrupt: tensor {shown(entry.name)} starts at byte {entry.start}, expected {end}; {_REMEDY}"
            )
        end += entry.num_bytes
    if end != file_bytes:
        kind = "truncated" if end > file_bytes else "corrupt"
        raise BadAdapter(f"{kind}: its tensors end at byte {end}, but the file has {file_bytes} bytes; {_REMEDY}")
    return entries


def read_tensor(file: BufferedIOBase, entry: TensorEntry) -> np.ndarray:
    """Reads one tensor in its own element type.

    Raises:
      BadAdapter: the file ends before the tensor does.
    """
    array = np.empty(entry.shape, DTYPES[entry.dtype])
    file.seek(entry.start)
    count = file.readinto(array.reshape(-1).view(np.uint8))
    if count != entry.num_bytes:
        raise BadAdapter(f"truncated: tensor {shown(entry.name)} has {count} of its {entry.num_bytes} bytes; {_REMEDY}")
    return array


class _NamedTwice(ValueError):
    """An object of the table has a name twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        # Readers differ in which of the two they take.
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NamedTwice(f"names {shown(twice)} twice")
    return fields


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise BadAdapter(
            f"corrupt: the table's entry of tensor {shown(name)} is malformed: dtype={shown(dtype)}, "
            f"shape={shown(shape)}, data_offsets={shown(offsets)}; {_REMEDY}"
        )
    if dtype not in DTYPES:
        raise BadAdapter(
            f"tensor {shown(name)} has element type {shown(dtype)}; supported are {', '.join(DTYPES)}; "
            "save the adapter in one of these"
        )
    start, end = offsets
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != num_bytes:
        raise BadAdapter(
            f"corrupt: tensor {shown(name)} of {dtype} {shape} should take {num_bytes} bytes, but has {end - start}; "
            f"{_REMEDY}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, num_bytes)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of few numbers that a file's size may have."""
    return isinstance(value, list) and len(value) <= _MAX_DIMS and all(type(v) is int and 0 <= v < 2**63 for v in value)
