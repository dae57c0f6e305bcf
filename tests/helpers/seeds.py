"""Where tests that draw at random begin."""

import os


def drawn_seed() -> int:
    """The same in every run, as a suite should not fail by chance; another with SLORA_TEST_SEED, to look further."""
    seed = int(os.environ.get("SLORA_TEST_SEED", 2026))
    print(f"SLORA_TEST_SEED={seed}")
    return seed
