"""A safetensors file read piece by piece: first its table of tensors, then single tensors.

Reads with plain file reads instead of a memory map, so that a file that somebody truncates under a running server is
a refused adapter and not a bus error.
"""

import json
import math
import os
from dataclasses import dataclass
from typing import BinaryIO

import ml_dtypes
import numpy as np

from slora_jax.errors import BadAdapter

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that are read, by their name in the file."""

_MAX_TABLE_BYTES = 16 * 2**20
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


def read_table(file: BinaryIO) -> tuple[bytes, int]:
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
    if length > _MAX_TABLE_BYTES:
        raise BadAdapter(f"its table of tensors takes {length} bytes, more than the {_MAX_TABLE_BYTES} allowed")
    return file.read(length), file_bytes


def parse_table(table: bytes, file_bytes: int) -> list[TensorEntry]:
    """Parses the table and checks that its tensors fill the rest of the file exactly.

    Returns:
      The tensors in the order of their bytes.

    Raises:
      BadAdapter: the table is corrupt, or names an unsupported element type.
    """
    try:
        fields = json.loads(table)
    except (ValueError, RecursionError):
        raise BadAdapter(f"corrupt: its table of tensors is not valid JSON; {_REMEDY}") from None
    if not isinstance(fields, dict):
        raise BadAdapter(f"corrupt: its table of tensors is not a JSON object; {_REMEDY}")
    end = _LENGTH_BYTES + len(table)
    entries = [_entry(name, value, end) for name, value in fields.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    for entry in entries:
        if entry.start != end:
            raise BadAdapter(f"corrupt: tensor {entry.name} starts at byte {entry.start}, expected {end}; {_REMEDY}")
        end += entry.num_bytes
    if end != file_bytes:
        kind = "truncated" if end > file_bytes else "corrupt"
        raise BadAdapter(f"{kind}: its tensors end at byte {end}, but the file has {file_bytes} bytes; {_REMEDY}")
    return entries


def read_tensor(file: BinaryIO, entry: TensorEntry) -> np.ndarray:
    """Reads one tensor in its own element type.

    Raises:
      BadAdapter: the file ends before the tensor does.
    """
    array = np.empty(entry.shape, DTYPES[entry.dtype])
    file.seek(entry.start)
    count = file.readinto(array.reshape(-1).view(np.uint8))
    if count != entry.num_bytes:
        raise BadAdapter(f"truncated: tensor {entry.name} has {count} of its {entry.num_bytes} bytes; {_REMEDY}")
    return array


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        well_formed = all(map(_is_count, (*shape, start, end)))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise BadAdapter(f"corrupt: the table's entry of tensor {name} is malformed; {_REMEDY}")
    if dtype not in DTYPES:
        raise BadAdapter(
            f"tensor {name} has element type {dtype!r}; supported are {', '.join(DTYPES)}; "
            "save the adapter in one of these"
        )
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != num_bytes:
        raise BadAdapter(
            f"corrupt: tensor {name} of {dtype} {shape} should take {num_bytes} bytes, but has {end - start}; {_REMEDY}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, num_bytes)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
