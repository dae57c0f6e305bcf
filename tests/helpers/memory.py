"""How much an object keeps alive, seen from outside."""

import gc
from types import FunctionType, ModuleType


def num_reachable(root: object) -> int:
    """How many objects are kept alive by ``root``, whatever holds them; code and classes aside."""
    seen, left = {id(root)}, [root]
    while left:
        for other in gc.get_referents(left.pop()):
            if id(other) not in seen and not isinstance(other, type | FunctionType | ModuleType):
                seen.add(id(other))
                left.append(other)
    return len(seen)
