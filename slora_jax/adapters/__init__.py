"""LoRA adapters on the host: PEFT folders (``peft``), the registry of what is known and loaded (``store``), and what
may stay in its bounded memory (``host_cache``).

No JAX and no torch here: adapters reach the device only as arrays that the engine copies into the pool.
"""
