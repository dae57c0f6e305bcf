"""Block sizes as data: ``tuned/<device>.json``, measured offline, and ``tuned/default.json`` for any other GPU.

A file maps ``op -> key -> {name: value}``. Entries of a device's file replace those of the default.
"""

import functools
import json
import re
from pathlib import Path

import jax

_FOLDER = Path(__file__).parent / "tuned"


def device_kind() -> str:
    """Kind of the GPU of this process; an H200 where there is none, as when lowering for CUDA on a CPU."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else "NVIDIA H200"


@functools.cache
def block_sizes(op: str, device_kind: str, key: str) -> dict[str, int]:
    """The block sizes of ``op`` for the GPU named like a file in ``tuned/`` (any case), else the default's.

    Raises:
      KeyError: no file has this op and key.
    """
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
