"""Block sizes as data: ``tuned/<device>.json``, measured offline, and ``tuned/default.json`` for any other GPU.

A file maps ``op -> key -> {name: value}``. Entries of a device's file replace those of the default.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax

_FOLDER = Path(__file__).parent / "tuned"
_overrides: dict[tuple[str, str], dict[str, int]] = {}


def device_kind() -> str:
    """Kind of the GPU of this process; an H200 where there is none, as when lowering for CUDA on a CPU."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else "NVIDIA H200"


def block_sizes(op: str, device_kind: str, key: str) -> dict[str, int]:
    """The block sizes of ``op`` for the GPU named like a file in ``tuned/`` (any case), else the default's.

    Raises:
      KeyError: no file has this op and key.
    """
    return _stored(op, device_kind, key) | _overrides.get((op, key), {})


@contextlib.contextmanager
def override(op: str, key: str, sizes: dict[str, int]) -> Iterator[None]:
    """Puts other sizes in place of some of an op's, for what is traced inside; for measuring them."""
    unknown = sizes.keys() - _table("default")[op][key].keys()
    if unknown:
        raise ValueError(f"{op} {key} has no block sizes {sorted(unknown)}")
    _overrides[op, key] = sizes
    try:
        yield
    finally:
        del _overrides[op, key]


@functools.cache
def _stored(op: str, device_kind: str, key: str) -> dict[str, int]:
    names = [path.stem for path in sorted(_FOLDER.glob("*.json"))]
    for name in names:
        if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE):
            sizes = _table(name).get(op, {}).get(key)
            if sizes is not None:
                return sizes
    return _table("default")[op][key]


@functools.cache
def _table(name: str) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((_FOLDER / f"{name}.json").read_text())
